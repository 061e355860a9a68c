"""Deltas: what takes one version to the next, and back. Lossless on the published bits.

`blocks.py` describes the bytes. A delta is reversible: the undo patch of a delta is the same bytes,
applied with `reverse=True`, and its redo the same bytes again.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from shared.weights.bits import to_bits
from shared.weights.blocks import BLOCK_ELEMENTS, CODEC, BlockWriter, spans
from shared.weights.delta_reader import Block, BytesSource, DeltaReader, Source
from shared.weights.delta_writer import DeltaWriter, check_same_model, check_same_tensors
from shared.weights.digests import MASK, specs, specs_bytes, to_hex, version_digest
from shared.weights.errors import Corrupt, WrongBase
from shared.weights.kernels.base import Bits
from shared.weights.kernels.choice import kernels_for
from shared.weights.ordered import ordered_map
from shared.wire.weights import TensorSpec

__all__ = [
    "BLOCK_ELEMENTS",
    "CODEC",
    "Applied",
    "Block",
    "BlockWriter",
    "BytesSource",
    "DeltaReader",
    "DeltaWriter",
    "Source",
    "apply",
    "encode",
    "spans",
]


@dataclass(frozen=True, slots=True)
class Applied:
    """What a state is after a delta."""

    tensors: tuple[TensorSpec, ...]
    """Its specs, in the order of those before; digests follow from the delta."""
    digest: str
    """Its version digest."""
    changed: frozenset[str]
    """Tensors that were written to."""
    num_changed: int
    """Elements that were written."""


def encode(
    old: Mapping[str, torch.Tensor],
    new: Mapping[str, torch.Tensor],
    *,
    tensors: Sequence[TensorSpec] | None = None,
    threads: int = 1,
) -> bytes:
    """Return the delta that takes `old` to `new`; `tensors` are the specs of `old` if known.

    Raises:
        WrongBase: names, shapes or dtypes disagree.
    """
    known = specs(old) if tensors is None else tensors
    return b"".join(DeltaWriter(old, new, tensors=known, threads=threads).pieces())


def apply(
    state: Mapping[str, torch.Tensor],
    reader: DeltaReader,
    *,
    reverse: bool = False,
    tensors: Sequence[TensorSpec],
    threads: int = 1,
) -> Applied:
    """Take `state` along a delta, in place.

    After any exception of this function the state is what it was before, except where reading the
    source failed a second time, while taking back.

    Args:
        state: contiguous tensors on the CPU, none sharing memory with another.
        reader: the delta.
        reverse: from its target to its base.
        tensors: specs of `state`, trusted.
        threads: that apply blocks.

    Raises:
        WrongBase: made for another state or another model; nothing was written.
        Corrupt: no delta, or one that does not lead where it says; what was written is taken back.
        ValueError: tensors that cannot be written in place.
    """
    check_same_tensors(
        {name: f"{code}{list(shape)}" for name, code, shape in reader.tensors},
        {spec.name: f"{spec.dtype}{list(spec.shape)}" for spec in tensors},
    )
    source, target = (reader.target, reader.base) if reverse else (reader.base, reader.target)
    held = version_digest(tensors)
    if held != source:
        raise WrongBase("version digest", source, held)
    check_same_model(tensors, state)
    bits = _writable_bits(state)
    kernels = kernels_for(specs_bytes(tensors))
    done: list[Block] = []

    def write(block: Block) -> int:
        part = bits[reader.tensors[block.tensor_index][0]]
        part = part[block.start : block.start + block.length]
        gain = kernels.apply(part, block.coded(), block.start, reverse=reverse)
        done.append(block)
        return gain

    def take_back(block: Block) -> None:
        part = bits[reader.tensors[block.tensor_index][0]]
        part = part[block.start : block.start + block.length]
        kernels.apply(part, block.coded(), block.start, reverse=not reverse)

    digests = {spec.name: int(spec.digest, 16) for spec in tensors}
    blocks = list(reader.blocks())
    try:
        for block, gain in zip(blocks, ordered_map(write, blocks, threads), strict=True):
            digests[reader.tensors[block.tensor_index][0]] += gain
        after = tuple(
            spec.model_copy(update={"digest": to_hex(digests[spec.name] & MASK)})
            for spec in tensors
        )
        found = version_digest(after)
        if found != target:
            raise Corrupt("version digest after the delta", target, found)
    except BaseException:
        for _ in ordered_map(take_back, done, threads):
            pass
        raise
    changed = frozenset(reader.tensors[block.tensor_index][0] for block in blocks)
    return Applied(after, found, changed, reader.num_changed)


def _writable_bits(state: Mapping[str, torch.Tensor]) -> dict[str, Bits]:
    ends: list[tuple[int, int, str]] = []
    for name, tensor in state.items():
        if tensor.device.type != "cpu" or not tensor.is_contiguous():
            raise ValueError(f"tensor {name!r} is not contiguous on the CPU")
        start, num_bytes = tensor.data_ptr(), tensor.numel() * tensor.element_size()
        if num_bytes:
            ends.append((start, start + num_bytes, name))
    ends.sort()
    for (_, end, name), (start, _, other) in itertools.pairwise(ends):
        if start < end:
            raise ValueError(f"tensors {name!r} and {other!r} share memory")
    return {name: to_bits(tensor) for name, tensor in state.items()}
