"""What leader and followers say to one another, and how shares of a step are joined. Pure.

The micro-batches of an optimizer step are numbered; of n data-parallel shares, share r takes
`batches[r::n]`, and what its loss noted of them goes back to those numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, runtime_checkable

T = TypeVar("T")


class RanksFailed(Exception):
    """A rank was lost, or ranks no longer agree: this job's backends are of no use any more.

    Not a RuntimeError: whoever skips what cannot be read must not skip this.
    """


@runtime_checkable
class Collects(Protocol):
    """A loss function that notes something of every micro-batch it is called with."""

    def collected(self) -> list[Any]:
        """Return one entry per micro-batch seen, in order: picklable, tensors on the CPU."""
        ...

    def merge(self, entries: Sequence[Any]) -> None:
        """Note exactly these, of all micro-batches of the step in order, whoever saw them."""
        ...


def noted(loss_fn: object) -> list[Any]:
    """Return what a loss function has noted; nothing of one that notes nothing."""
    return loss_fn.collected() if isinstance(loss_fn, Collects) else []


@dataclass(frozen=True)
class Command:
    """One method of one backend, performed by all ranks."""

    backend: int
    method: str
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class Answer:
    """How a rank fared."""

    value: Any = None
    refusal: str = ""
    """Why it refused, having changed nothing."""


@dataclass(frozen=True)
class Part:
    """What a rank made of its share of an optimizer step."""

    share: int
    """Which data-parallel share it belongs to."""
    loss: float
    entries: list[Any]
    """What its loss noted; empty where other stages of a pipeline compute the loss."""


def share_of(batches: Sequence[T], share: int, shares: int) -> Sequence[T]:
    """Return one data-parallel share of a step's micro-batches.

    Raises:
        ValueError: the shares are not of equal size: ranks work in lockstep.
    """
    if len(batches) % shares:
        raise ValueError(
            f"{len(batches)} micro-batches for {shares} data-parallel ranks: each takes as many"
        )
    return batches[share::shares]


def joined(parts: Sequence[Part], shares: int) -> tuple[float, list[Any]]:
    """Return the loss of the step and the entries of all its micro-batches, in their order.

    Of the ranks of one share (tensor-parallel ones compute the same, of a pipeline only the last
    stage computes it) the first that has seen the loss speaks.

    Args:
        parts: by rank.
        shares: number of data-parallel shares.
    """
    spoken: dict[int, Part] = {}
    for part in parts:
        before = spoken.get(part.share)
        if before is None or (not before.entries and (part.entries or not before.loss)):
            spoken[part.share] = part
    by_share = [spoken[share] for share in range(shares)]
    entries = [entry for step in zip(*(p.entries for p in by_share), strict=True) for entry in step]
    return sum(part.loss for part in by_share), entries
