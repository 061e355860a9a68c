"""Writes the delta between two states, block by block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from shared.weights.bits import code_of, to_bits
from shared.weights.blocks import BLOCK, BlockWriter, spans
from shared.weights.digests import MASK, specs_bytes, to_hex, version_digest
from shared.weights.errors import WrongBase
from shared.weights.kernels.base import Bits
from shared.weights.kernels.choice import kernels_for
from shared.weights.ordered import ordered_map
from shared.wire.weights import TensorSpec


class DeltaWriter:
    """The delta that takes `old` to `new`, streamed.

    The bytes do not depend on the number of threads. Neither state may change meanwhile.
    """

    def __init__(
        self,
        old: Mapping[str, torch.Tensor],
        new: Mapping[str, torch.Tensor],
        *,
        tensors: Sequence[TensorSpec],
        threads: int = 1,
    ) -> None:
        """Compare two states of one model.

        Args:
            old: the base.
            new: same names, shapes and dtypes; a tensor that is not contiguous or not on the CPU is
                copied while it is its turn.
            tensors: specs of `old`, trusted.
            threads: that code blocks.

        Raises:
            WrongBase: names, shapes or dtypes disagree.
        """
        self._specs = tuple(tensors)
        for side in (old, new):
            check_same_model(self._specs, side)
        self._old, self._new, self._threads = old, new, threads
        self._after: tuple[TensorSpec, ...] | None = None
        self._changed = 0

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """Specs of `new`, in the order of those of `old`; known once `pieces` is exhausted."""
        assert self._after is not None, "exhaust pieces() first"
        return self._after

    @property
    def changed(self) -> int:
        """Elements that differ; known once `pieces` is exhausted."""
        assert self._after is not None, "exhaust pieces() first"
        return self._changed

    @property
    def elements(self) -> int:
        """Elements of the model."""
        return sum(self._old[spec.name].numel() for spec in self._specs)

    def pieces(self) -> Iterator[bytes]:
        """Yield the delta record by record; memory is bounded by a few blocks per thread."""
        writer = BlockWriter(kernels_for(specs_bytes(self._specs)))
        yield writer.header(version_digest(self._specs), self._specs)

        def coded(block: tuple[int, int, Bits, Bits]) -> tuple[int, tuple[bytes, int] | None]:
            return block[0], writer.block(*block)

        digests = [int(spec.digest, 16) for spec in self._specs]
        changed = 0
        for index, record in ordered_map(coded, self._blocks(), self._threads):
            if record is not None:
                data, gain = record
                digests[index] = (digests[index] + gain) & MASK
                changed += int(BLOCK.unpack_from(data)[3])
                yield data
        after = tuple(
            spec.model_copy(update={"digest": to_hex(digest)})
            for spec, digest in zip(self._specs, digests, strict=True)
        )
        yield writer.trailer(version_digest(after))
        self._after, self._changed = after, changed

    def _blocks(self) -> Iterator[tuple[int, int, Bits, Bits]]:
        for index, spec in enumerate(self._specs):
            old, new = to_bits(self._old[spec.name]), to_bits(self._new[spec.name])
            for start, length in spans(0, len(old)):
                yield index, start, old[start : start + length], new[start : start + length]


def check_same_model(tensors: Sequence[TensorSpec], state: Mapping[str, torch.Tensor]) -> None:
    """Compare a state with specs.

    Raises:
        WrongBase: names, shapes or dtypes disagree; names both sides.
    """
    described = {spec.name: f"{spec.dtype}{list(spec.shape)}" for spec in tensors}
    held = {name: f"{code_of(t.dtype)}{list(t.shape)}" for name, t in state.items()}
    check_same_tensors(described, held)


def check_same_tensors(expected: Mapping[str, str], held: Mapping[str, str]) -> None:
    """Compare names and forms, both as name -> dtype and shape.

    Raises:
        WrongBase: they disagree.
    """
    for name in sorted(set(expected) | set(held)):
        theirs, ours = expected.get(name, "absent"), held.get(name, "absent")
        if theirs != ours:
            raise WrongBase(f"tensor {name!r}", theirs, ours)
