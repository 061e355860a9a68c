"""Where one rank of an engine keeps the published tensors.

An engine fuses (qkv, gate and up), shards (tensor parallel), stacks (experts), replicates (norms,
key-value heads), pads (vocabulary) and ties them. All of these are boxes of a published tensor, the
*source*, that lie as boxes in a *local* tensor: a `Layout` is the list of them. `layout_parts.py`
builds it, `local_patches.py` takes deltas through it, `local_digests.py` checks the copy against
the manifest.

Shapes: S dimensions of the source, L of the local tensor. All positions are flat, in C order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from shared.wire.weights import TensorSpec

Shape = tuple[int, ...]


class Piece(NamedTuple):
    """A box of a published tensor."""

    source: str
    start: Shape
    size: Shape

    def __str__(self) -> str:
        """Return the box as one would index it."""
        ranges = (f"{a}:{a + n}" for a, n in zip(self.start, self.size, strict=True))
        return f"{self.source}[{', '.join(ranges)}]"


@dataclass(frozen=True, slots=True)
class Placement:
    """A box of one source, and where it lies in the local tensor.

    Element `start + i` of the source (0 <= i[d] < size[d]) lies in the local tensor at `offset`,
    moved by `i[d] * step[d]` along the local dimension `dims[d]`, for every d.
    """

    source: str
    """Published name."""
    source_shape: Shape
    """[S]"""
    start: Shape
    """[S]"""
    size: Shape
    """[S]"""
    dims: Shape
    """[S]: the local dimension that a source dimension runs along; all different."""
    offset: Shape
    """[L]"""
    step: Shape
    """[S]: above 1 where sources are interleaved."""
    owned: bool = True
    """Counted in the sum of digests over ranks. Of several copies of an element one is owned."""
    tied_names: tuple[str, ...] = ()
    """Other published names of the source: the same elements under another name."""

    @property
    def piece(self) -> Piece:
        return Piece(self.source, self.start, self.size)

    @property
    def names(self) -> tuple[str, ...]:
        """All published names."""
        return (self.source, *self.tied_names)

    @property
    def num_elements(self) -> int:
        return math.prod(self.size)


@dataclass(frozen=True, slots=True)
class LocalTensor:
    """One tensor of the engine. Elements in no placement are padding and never touched."""

    shape: Shape
    placements: tuple[Placement, ...]


class Layout:
    """Everything that one rank holds of the published tensors; checked when it is made.

    Raises:
        ValueError: a box outside its tensor, two boxes over each other, or one source described
            with two shapes. Local and published name are in the message.
    """

    def __init__(self, tensors: Mapping[str, LocalTensor]) -> None:
        self.tensors = dict(tensors)
        self.sources: dict[str, Shape] = {}
        """Shape of every published tensor of which this rank holds something."""
        for local, tensor in self.tensors.items():
            for placement in tensor.placements:
                _check_inside(local, tensor, placement)
                for name in placement.names:
                    shape = self.sources.setdefault(name, placement.source_shape)
                    if shape != placement.source_shape:
                        raise ValueError(
                            f"layout of {local!r}: source {name!r} has shape "
                            f"{list(placement.source_shape)} here and {list(shape)} elsewhere"
                        )
            _check_apart(local, tensor)

    def placements(self) -> Iterable[tuple[str, Placement]]:
        """Yield (local name, placement)."""
        for local, tensor in self.tensors.items():
            for placement in tensor.placements:
                yield local, placement


def check_cover(layouts: Sequence[Layout], specs: Iterable[TensorSpec]) -> None:
    """Check that all ranks together hold the published version, every element owned once.

    Args:
        layouts: of all ranks.
        specs: the tensors of a manifest.

    Raises:
        ValueError: names the tensor that is missing, unknown, of another shape, not covered, owned
            twice, or copied from a box that no rank owns.
    """
    published = {spec.name: spec.shape for spec in specs}
    known: dict[str, Shape] = {}
    for layout in layouts:
        known.update(layout.sources)
    if odd := sorted(published.keys() ^ known.keys()):
        side = "published" if odd[0] in published else "in the layouts"
        raise ValueError(f"tensor {odd[0]!r} is only {side} ({len(odd)} such tensors)")
    owned: dict[str, list[Piece]] = {name: [] for name in published}
    copies: list[tuple[int, Piece]] = []
    for rank, layout in enumerate(layouts):
        for name, shape in layout.sources.items():
            if shape != published[name]:
                raise ValueError(
                    f"tensor {name!r}: published {list(published[name])}, "
                    f"in the layout of rank {rank} {list(shape)}"
                )
        for _, placement in layout.placements():
            for name in placement.names:
                piece = Piece(name, placement.start, placement.size)
                if placement.owned:
                    owned[name].append(piece)
                else:
                    copies.append((rank, piece))
    for name, shape in published.items():
        _check_tiled(name, shape, owned[name])
    owned_pieces = {piece for pieces in owned.values() for piece in pieces}
    for rank, piece in copies:
        if piece not in owned_pieces:
            raise ValueError(f"rank {rank} holds a copy of {piece}, a box that no rank owns")


def c_strides(shape: Shape) -> Shape:
    """Return the strides, in elements, of a tensor in C order."""
    strides: list[int] = []
    stride = 1
    for size in reversed(shape):
        strides.append(stride)
        stride *= max(size, 1)
    return tuple(reversed(strides))


def _check_inside(local: str, tensor: LocalTensor, placement: Placement) -> None:
    where = f"layout of {local!r}: {placement.piece}"
    num_dims = len(placement.source_shape)
    lengths = {len(placement.start), len(placement.size), len(placement.dims), len(placement.step)}
    if lengths != {num_dims} or len(placement.offset) != len(tensor.shape):
        raise ValueError(f"{where}: one number per dimension is needed")
    if len(set(placement.dims)) != num_dims or not all(
        0 <= dim < len(tensor.shape) for dim in placement.dims
    ):
        raise ValueError(f"{where}: dimensions {list(placement.dims)} of {list(tensor.shape)}")
    if min((*placement.start, *placement.size, *placement.offset), default=0) < 0:
        raise ValueError(f"{where}: negative start, size or offset")
    if min(placement.step, default=1) < 1:
        raise ValueError(f"{where}: step {list(placement.step)} is below 1")
    for length, start, size in zip(
        placement.source_shape, placement.start, placement.size, strict=True
    ):
        if start + size > length:
            raise ValueError(f"{where}: reaches beyond the shape {list(placement.source_shape)}")
    last = list(placement.offset)
    for dim, size, step in zip(placement.dims, placement.size, placement.step, strict=True):
        last[dim] += (size - 1) * step
    if placement.num_elements and any(
        end >= length for end, length in zip(last, tensor.shape, strict=True)
    ):
        raise ValueError(f"{where}: lies outside the local shape {list(tensor.shape)}")


def _check_apart(local: str, tensor: LocalTensor) -> None:
    """Refuse two placements that write the same local element."""
    placements = [p for p in tensor.placements if p.num_elements]
    starts = _rows([p.offset for p in placements], len(tensor.shape))
    sizes, steps = np.ones_like(starts), np.ones_like(starts)
    for row, placement in enumerate(placements):
        for dim, size, step in zip(placement.dims, placement.size, placement.step, strict=True):
            sizes[row, dim], steps[row, dim] = size, step
    if pair := _overlapping(starts, sizes, steps):
        first, second = (placements[i].piece for i in pair)
        raise ValueError(f"layout of {local!r}: {first} and {second} lie over each other")


def _check_tiled(name: str, shape: Shape, pieces: Sequence[Piece]) -> None:
    """Refuse pieces that leave out an element or hold one twice."""
    full = [piece for piece in pieces if math.prod(piece.size)]
    starts = _rows([piece.start for piece in full], len(shape))
    sizes = _rows([piece.size for piece in full], len(shape))
    if pair := _overlapping(starts, sizes, np.ones_like(sizes)):
        raise ValueError(f"two ranks own the same elements: {full[pair[0]]} and {full[pair[1]]}")
    covered = sum(math.prod(piece.size) for piece in full)
    if covered != math.prod(shape):
        raise ValueError(f"tensor {name!r}: ranks own {covered} of {math.prod(shape)} elements")


def _rows(tuples: Sequence[Shape], num_dims: int) -> npt.NDArray[np.int64]:
    return np.array(tuples, np.int64).reshape(len(tuples), num_dims)


def _overlapping(
    starts: npt.NDArray[Any], sizes: npt.NDArray[Any], steps: npt.NDArray[Any]
) -> tuple[int, int] | None:
    """Return a pair of overlapping boxes [P, L], or None.

    Two boxes are apart when they are apart along one dimension: their ranges end before each other,
    or their strides never meet. Of different steps only the common divisor is looked at, so that a
    layout may be refused that is sound, never the other way round.
    """
    ends = starts + (sizes - 1) * steps
    for row in range(len(starts) - 1):
        rest = slice(row + 1, None)
        beyond = (starts[row] > ends[rest]) | (starts[rest] > ends[row])
        never = (starts[rest] - starts[row]) % np.gcd(steps[rest], steps[row]) != 0
        hits = np.flatnonzero(~(beyond | never).any(axis=1))
        if len(hits):
            return row, row + 1 + int(hits[0])
    return None
