"""What the elevator is told (events) and what it orders (actions)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shared.backends.trajectory_scoring import Piece


@dataclass(frozen=True, slots=True)
class Part:
    """One version's work in one sequence of one trajectory."""

    job: int
    index: int
    """Among the job's parts."""
    version: int
    num_tokens: int
    """Prefix tokens to forward."""


def parts_of(job: int, pieces: Sequence[Piece]) -> tuple[Part, ...]:
    """Return the pieces of a trajectory as the elevator sees them."""
    return tuple(
        Part(job, index, piece.version, len(piece.token_ids)) for index, piece in enumerate(pieces)
    )


# --- events


@dataclass(frozen=True, slots=True)
class Arrived:
    """A trajectory to score; `job` is unique."""

    job: int
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Held:
    """The history can materialise this version; older ones must exist too."""

    version: int


@dataclass(frozen=True, slots=True)
class CaughtUp:
    """Everything published so far is held, or was given up."""


@dataclass(frozen=True, slots=True)
class Lost:
    """The history can no longer materialise this version."""

    version: int


@dataclass(frozen=True, slots=True)
class Gone:
    """The bus cannot bring this version back."""

    version: int


@dataclass(frozen=True, slots=True)
class AskFailed:
    """The bus did not answer; the version may exist."""

    version: int


@dataclass(frozen=True, slots=True)
class Floor:
    """Nobody needs versions below this one."""

    version: int


@dataclass(frozen=True, slots=True)
class Moved:
    """A `Move` ended: the backend holds the version's bytes and its canary was scored."""

    version: int
    verified: bool


@dataclass(frozen=True, slots=True)
class MoveFailed:
    """A `Move` found the version missing from the history."""

    version: int


@dataclass(frozen=True, slots=True)
class Scored:
    """The last `ScorePack` ended."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


@dataclass(frozen=True, slots=True)
class Drain:
    """Nothing more arrives: score what is held without waiting for company."""


Event = (
    Arrived | Held | CaughtUp | Lost | Gone | AskFailed | Floor | Moved | MoveFailed | Scored
    | Tick | Drain
)  # fmt: skip

# --- actions


@dataclass(frozen=True, slots=True)
class Move:
    """Materialise a version and score its canary; answer with `Moved` or `MoveFailed`."""

    version: int


@dataclass(frozen=True, slots=True)
class ScorePack:
    """Score these parts under the version the backend holds; answer with `Scored`."""

    version: int
    verified: bool
    """False: the canary disagrees after every retry; the result is never exact."""
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Ask:
    """Fetch a version from the bus; answer with `Held`, `Gone` or `AskFailed`."""

    version: int
    afresh: bool
    """The bytes held disagree with the canary: do not reuse them."""


@dataclass(frozen=True, slots=True)
class Unscorable:
    """These parts' version is gone for good: zeros, and never another version's numbers."""

    version: int
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Store:
    """Every part of the trajectory is settled."""

    job: int


@dataclass(frozen=True, slots=True)
class Evict:
    """Let go of versions below this one."""

    below: int


Action = Move | ScorePack | Ask | Unscorable | Store | Evict
