"""What following the weights can refuse. The weights in use stay as they are.

WeightsError
├── MissingVersion  not held, and (after `ensure`) gone from the bus for good
├── ChunkGone       a piece of a keyframe or delta is not on the bus within the bound
├── WrongBase       a delta for another base or another model
└── Corrupt         bytes that are not what their digest or their codec says
"""

from __future__ import annotations

from collections.abc import Iterable


class WeightsError(Exception):
    """Base of everything this package raises on purpose."""


class MissingVersion(WeightsError):
    """The version cannot be materialised here; never substitute another one."""

    def __init__(self, version: int, held: Iterable[int]) -> None:
        self.version = version
        self.held = tuple(sorted(held))
        shown = f"{self.held[0]}..{self.held[-1]}" if self.held else "none"
        super().__init__(f"policy version {version} is not held (held: {shown})")


class ChunkGone(WeightsError):
    """A chunk was not there within the bound: swept, purged or never stored."""

    def __init__(self, subject: str) -> None:
        super().__init__(f"{subject}: not on the bus")
        self.subject = subject


class WrongBase(WeightsError):
    """A patch was made for another state than the one it was applied to."""

    def __init__(self, what: str, expected: str, held: str) -> None:
        super().__init__(f"delta for another base: {what}: it expects {expected}, held is {held}")
        self.what = what
        self.expected = expected
        self.held = held


class Corrupt(WeightsError):
    """Bytes disagree with their digest, or cannot be read by their codec."""

    def __init__(self, what: str, expected: str, found: str) -> None:
        super().__init__(f"{what}: expected {expected}, found {found}")
        self.what = what
        self.expected = expected
        self.found = found
