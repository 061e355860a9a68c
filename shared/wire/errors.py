"""Everything the wire contract can refuse.

WireError
├── Malformed         not ours, truncated, wrong shape: can never be read
├── Oversized         larger than the declared bound
├── ForeignMajor      another major version: a newer or older peer may read it
└── UnexpectedType    a valid message of a type this consumer does not take
"""

from __future__ import annotations


class WireError(Exception):
    """A payload that cannot be accepted. `decode` raises nothing else, whatever the bytes."""


class Malformed(WireError):
    """The bytes are no message of this contract."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Oversized(WireError):
    """The payload exceeds the bound the reader accepts."""

    def __init__(self, num_bytes: int, bound_bytes: int) -> None:
        super().__init__(f"payload of {num_bytes} bytes exceeds the bound of {bound_bytes}")
        self.num_bytes = num_bytes
        self.bound_bytes = bound_bytes


class ForeignMajor(WireError):
    """The payload speaks another major version: hand it back, do not dead-letter it."""

    def __init__(self, theirs: tuple[int, int], ours: tuple[int, int]) -> None:
        super().__init__(
            f"wire {theirs[0]}.{theirs[1]} cannot be read by {ours[0]}.{ours[1]}: "
            "finish the rolling upgrade, then it is delivered again"
        )
        self.theirs = theirs
        self.ours = ours


class UnexpectedType(WireError):
    """A well-formed message of a type that this consumer does not take."""

    def __init__(self, type_name: str, accepted: tuple[str, ...]) -> None:
        super().__init__(f"message type {type_name!r}; accepted here: {', '.join(accepted)}")
        self.type_name = type_name
        self.accepted = accepted
