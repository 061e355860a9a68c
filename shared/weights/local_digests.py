"""Digests of what a rank holds, on its device, comparable with the manifest's.

The digest of a tensor is a sum over its elements (`digests.py`), so that every rank sums over the
elements it holds, at their indices in the *published* tensor, and the ranks add up. Copies are
counted on the rank that owns them and compared with the owner's everywhere else.

Shapes: N elements of a piece, K changed ones. 64-bit sums and products wrap around; torch has no
unsigned ones, and modulo 2^64 there is no difference.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

import torch

from shared.weights.digests import MASK, to_hex
from shared.weights.errors import Corrupt
from shared.weights.layouts import Layout, Piece, Placement, Shape, c_strides
from shared.weights.local_tensors import LocalTensors, bits_of, box_of, check_local

# The constants of `digests.py`; the tests hold one against the other.
_INDEX_KEY = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)

CPU_CHUNK = 1 << 15
"""Elements hashed at a time on a CPU: the scratch stays in its cache."""

DEVICE_CHUNK = 1 << 20
"""Elsewhere: 32 MB of scratch, and few launches."""


@dataclass
class ShardDigests:
    """Sums of one rank, or what a delta added to them."""

    owned: dict[Piece, int] = field(default_factory=dict[Piece, int])
    """u64 by published box; boxes that two names share are listed under both."""
    copies: dict[tuple[str, Piece], int] = field(default_factory=dict[tuple[str, Piece], int])
    """u64 by (local name, published box) of which this rank holds a copy only."""

    def add(self, local: str, placement: Placement, amount: int) -> None:
        """Add to the sum of a placement in the local tensor `local`."""
        for name in placement.names:
            piece = Piece(name, placement.start, placement.size)
            if placement.owned:
                self.owned[piece] = (self.owned.get(piece, 0) + amount) & MASK
            else:
                key = (local, piece)
                self.copies[key] = (self.copies.get(key, 0) + amount) & MASK

    def merge(self, other: Self) -> None:
        """Add the sums of another part of the same delta."""
        for piece, amount in other.owned.items():
            self.owned[piece] = (self.owned.get(piece, 0) + amount) & MASK
        for key, amount in other.copies.items():
            self.copies[key] = (self.copies.get(key, 0) + amount) & MASK

    def by_source(self) -> dict[str, int]:
        """Return this rank's addend (u64) to the digest of each published tensor."""
        return summed([self])


def local_digests(local: LocalTensors, layout: Layout) -> ShardDigests:
    """Digest everything that this rank holds; padding is not part of it.

    Raises:
        ValueError: the tensors are not those of the layout.
    """
    check_local(local, layout)
    digests = ShardDigests()
    with torch.inference_mode():
        for name, placement in layout.placements():
            digests.add(name, placement, _piece_digest(local[name], placement))
    return digests


def summed(shards: Iterable[ShardDigests]) -> dict[str, int]:
    """Return the digests (u64) by published tensor from those of all ranks."""
    total: dict[str, int] = {}
    for shard in shards:
        for piece, amount in shard.owned.items():
            total[piece.source] = (total.get(piece.source, 0) + amount) & MASK
    return total


def check_digests(shards: Sequence[ShardDigests], expected: Mapping[str, int]) -> None:
    """Compare all ranks with the published digests, or their changes with the published changes.

    Args:
        shards: of every rank, in order; all of `local_digests`, or all of one delta.
        expected: u64 by published tensor; what is absent must be 0.

    Raises:
        Corrupt: names the tensor, or the copy and its rank, that is not what was published.
    """
    found = summed(shards)
    for name in sorted(expected.keys() | found.keys()):
        if found.get(name, 0) != expected.get(name, 0):
            raise Corrupt(
                f"device copy of {name!r}",
                to_hex(expected.get(name, 0)),
                to_hex(found.get(name, 0)),
            )
    owners: dict[Piece, int] = {}
    for shard in shards:
        owners |= shard.owned
    for rank, shard in enumerate(shards):
        for (local, piece), amount in shard.copies.items():
            if amount != owners.get(piece, 0):
                raise Corrupt(
                    f"copy of {piece} in {local!r} on rank {rank}",
                    to_hex(owners.get(piece, 0)),
                    to_hex(amount),
                )


def contributions(indices: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """Return what elements add to the digest of their tensor: a scalar i8, modulo 2^64.

    Args:
        indices: i8[K], flat, in the published tensor.
        bits: signed integers [K].
    """
    key = (indices + 1) * _INDEX_KEY
    key ^= _shifted(key, 29)
    wide = bits.to(torch.int64)
    key += wide if bits.element_size() == 8 else wide & ((1 << 8 * bits.element_size()) - 1)
    key *= _MIX_1
    key ^= _shifted(key, 32)
    key *= _MIX_2
    key ^= _shifted(key, 29)
    return key.sum()


def _shifted(key: torch.Tensor, by: int) -> torch.Tensor:
    """Shift right as if unsigned."""
    return (key >> by) & ((1 << (64 - by)) - 1)


def _piece_digest(tensor: torch.Tensor, placement: Placement) -> int:
    strides = c_strides(placement.source_shape)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    limit = CPU_CHUNK if tensor.device.type == "cpu" else DEVICE_CHUNK
    for box, start in _chunks(bits_of(box_of(tensor, placement)), placement.start, limit):
        indices = torch.zeros((), dtype=torch.int64, device=tensor.device)
        for size, first, stride in zip(box.shape, start, strides, strict=True):
            along = torch.arange(first, first + size, dtype=torch.int64, device=tensor.device)
            indices = indices.unsqueeze(-1) + along * stride
        total += contributions(indices, box)
    return int(total.item()) & MASK


def _chunks(box: torch.Tensor, start: Shape, limit: int) -> Iterator[tuple[torch.Tensor, Shape]]:
    """Cut a box [size] at `start` into boxes of `limit` elements at most."""
    if box.numel() <= limit:
        if box.numel():
            yield box, start
        return
    # The outermost dimension first, so that the pieces are runs of memory where the box is.
    dim = next(d for d in range(box.dim()) if box.shape[d] > 1)
    length = max(1, box.shape[dim] * limit // box.numel())
    for first in range(0, box.shape[dim], length):
        part = box.narrow(dim, first, min(length, box.shape[dim] - first))
        moved = (*start[:dim], start[dim] + first, *start[dim + 1 :])
        yield from _chunks(part, moved, limit)
