"""The usual ways in which engines lay out weights, to be composed into a `Layout`.

    Layout({
        "qkv_proj.weight": fuse(shard_rows(q, mine), shard_rows(k, kv), shard_rows(v, kv)),
        "o_proj.weight": shard_columns(o, mine),
        "experts.w2_weight": stack(*(shard_columns(down, mine) for down in experts)),
    })

Shapes: R rows (dimension 0, outputs of a linear layer), C columns (dimension 1, inputs).
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from shared.weights.layouts import LocalTensor, Placement, Shape


class Source(NamedTuple):
    """A published tensor."""

    name: str
    shape: Shape


class Share(NamedTuple):
    """Which of so many equal parts this rank holds, and whether it is the owner of its copy."""

    part: int
    parts: int
    owned: bool = True


def share_of(rank: int, num_ranks: int, *, copies: int = 1) -> Share:
    """Return the share of a rank where `copies` consecutive ranks hold the same part.

    Raises:
        ValueError: the ranks do not divide into such groups.
    """
    if not 0 <= rank < num_ranks or copies < 1 or num_ranks % copies:
        raise ValueError(f"rank {rank} of {num_ranks} with {copies} copies")
    return Share(rank // copies, num_ranks // copies, owned=rank % copies == 0)


def box(source: Source, start: Shape, size: Shape, *, owned: bool = True) -> LocalTensor:
    """A box of the source, as it is."""
    dims = tuple(range(len(source.shape)))
    placement = Placement(
        source=source.name,
        source_shape=source.shape,
        start=start,
        size=size,
        dims=dims,
        offset=(0,) * len(dims),
        step=(1,) * len(dims),
        owned=owned,
    )
    return LocalTensor(shape=size, placements=(placement,))


def replicate(source: Source, rank: int) -> LocalTensor:
    """The whole source on every rank, owned by rank 0."""
    return box(source, (0,) * len(source.shape), source.shape, owned=rank == 0)


def shard(source: Source, share: Share, *, dim: int) -> LocalTensor:
    """An equal part of one dimension.

    Raises:
        ValueError: the dimension does not divide.
    """
    length = source.shape[dim]
    if length % share.parts:
        raise ValueError(
            f"{source.name!r}: {length} in dimension {dim} do not divide by {share.parts}"
        )
    start, size = [0] * len(source.shape), list(source.shape)
    size[dim] = length // share.parts
    start[dim] = share.part * size[dim]
    return box(source, tuple(start), tuple(size), owned=share.owned)


def shard_rows(source: Source, share: Share) -> LocalTensor:
    """Column parallel: [R, C] -> [R / n, C]; a bias [R] -> [R / n]."""
    return shard(source, share, dim=0)


def shard_columns(source: Source, share: Share) -> LocalTensor:
    """Row parallel: [R, C] -> [R, C / n]."""
    return shard(source, share, dim=1)


def shard_vocabulary(source: Source, share: Share, *, multiple: int) -> LocalTensor:
    """Vocabulary parallel: rows padded to a multiple, then shared out; the padding is no source.

    Raises:
        ValueError: the padded rows do not divide.
    """
    num_rows = source.shape[0]
    padded = -(-num_rows // multiple) * multiple
    if padded % share.parts:
        raise ValueError(f"{source.name!r}: {padded} padded rows do not divide by {share.parts}")
    per_rank = padded // share.parts
    start = min(share.part * per_rank, num_rows)
    held = min(start + per_rank, num_rows) - start
    rest = source.shape[1:]
    part = box(source, (start, *[0] * len(rest)), (held, *rest), owned=share.owned)
    return pad(part, (per_rank, *rest))


def fuse(*parts: LocalTensor, dim: int = 0) -> LocalTensor:
    """Parts one after the other along a dimension: qkv, gate and up.

    Raises:
        ValueError: no part, or the other dimensions disagree.
    """
    others = {(*part.shape[:dim], *part.shape[dim + 1 :]) for part in parts}
    if len(others) != 1:
        raise ValueError(f"shapes {[list(p.shape) for p in parts]} do not fuse along {dim}")
    placements: list[Placement] = []
    filled = 0
    for part in parts:
        placements += [_moved(placement, dim, filled) for placement in part.placements]
        filled += part.shape[dim]
    shape = list(parts[0].shape)
    shape[dim] = filled
    return LocalTensor(tuple(shape), tuple(placements))


def stack(*parts: LocalTensor) -> LocalTensor:
    """Parts of one shape under a new first dimension: experts.

    Raises:
        ValueError: no part, or the shapes disagree.
    """
    if len({part.shape for part in parts}) != 1:
        raise ValueError(f"shapes {[list(p.shape) for p in parts]} do not stack")
    placements = tuple(
        replace(
            placement,
            dims=tuple(dim + 1 for dim in placement.dims),
            offset=(index, *placement.offset),
        )
        for index, part in enumerate(parts)
        for placement in part.placements
    )
    return LocalTensor((len(parts), *parts[0].shape), placements)


def pad(part: LocalTensor, shape: Shape) -> LocalTensor:
    """The part at the origin of a larger tensor, whose other elements are never touched."""
    if len(shape) != len(part.shape) or any(a > b for a, b in zip(part.shape, shape, strict=True)):
        raise ValueError(f"a part of shape {list(part.shape)} does not fit into {list(shape)}")
    return replace(part, shape=shape)


def tied_copy(part: LocalTensor) -> LocalTensor:
    """A second local tensor with the same source: one published, two on the device.

    Example: an engine that keeps the output head apart from the embedding it is tied to.
    """
    copied = tuple(replace(placement, owned=False) for placement in part.placements)
    return replace(part, placements=copied)


def tied_name(part: LocalTensor, name: str) -> LocalTensor:
    """A second published name of the same elements: two published, one on the device."""
    named = tuple(
        replace(placement, tied_names=(*placement.tied_names, name))
        for placement in part.placements
    )
    return replace(part, placements=named)


def _moved(placement: Placement, dim: int, by: int) -> Placement:
    offset = list(placement.offset)
    offset[dim] += by
    return replace(placement, offset=tuple(offset))
