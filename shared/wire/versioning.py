"""The wire version and what a reader does with another one.

Within a major, a newer minor only adds fields: readers ignore what they do not know, so a rolling
upgrade never dead-letters healthy work. A different major is refused and handed back with delay.
"""

from __future__ import annotations

from shared.wire.errors import ForeignMajor

WIRE_VERSION: tuple[int, int] = (2, 2)
"""(major, minor), in every payload."""


def check_readable(theirs: tuple[int, int]) -> None:
    """Accept any minor of our major.

    Raises:
        ForeignMajor: the major differs.
    """
    if theirs[0] != WIRE_VERSION[0]:
        raise ForeignMajor(theirs, WIRE_VERSION)
