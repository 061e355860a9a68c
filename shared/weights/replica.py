"""One full copy of the model, exact or absent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch

from shared.weights import deltas
from shared.weights.deltas import DeltaReader
from shared.weights.digests import sha256_of, specs, version_digest
from shared.weights.errors import Corrupt, WrongBase
from shared.wire.weights import TensorSpec

State = Mapping[str, torch.Tensor]
"""Published tensors by Hugging Face name: contiguous, on the CPU, not to be written to."""


class Replica:
    """One full copy, moved in place from version to version.

    While it is written it holds nothing; afterwards it holds what is proved to be exact. A failure
    leaves the version before it or nothing, never a mixture.
    """

    def __init__(self, *, threads: int = 1) -> None:
        """Hold nothing yet; `threads` apply deltas."""
        self.threads = threads
        self._state: State = MappingProxyType({})
        self._tensors: tuple[TensorSpec, ...] = ()
        self._digest = ""

    @property
    def is_empty(self) -> bool:
        """Nothing is held."""
        return not self._digest

    @property
    def state(self) -> State:
        """The tensors."""
        return self._state

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """Their specs."""
        return self._tensors

    @property
    def digest(self) -> str:
        """Their version digest; empty when nothing is held."""
        return self._digest

    def apply(
        self,
        reader: DeltaReader,
        *,
        reverse: bool = False,
        expected: Sequence[TensorSpec],
        sha256: str | None = None,
    ) -> frozenset[str]:
        """Take the copy along a delta; return the names of the tensors it wrote to.

        After a failure the whole copy is read: if it still is what its digests say, it stays.
        Otherwise the fault may be its own, and nothing is held any more.

        Args:
            reader: the delta.
            reverse: from its target to its base.
            expected: specs of the version it must lead to.
            sha256: full hash of that version, to be compared as well.

        Raises:
            WrongBase: made for another version or another model; nothing was written.
            Corrupt: no delta, or one that leads elsewhere, or the copy itself was wrong.
            OSError: the delta cannot be read.
        """
        leads_to, wanted = reader.base if reverse else reader.target, version_digest(expected)
        if leads_to != wanted:
            raise Corrupt("delta", f"one that leads to version digest {wanted}", leads_to)
        state, tensors = self.take()
        try:
            applied = self._applied(state, reader, tensors, reverse=reverse)
            if sha256 is not None and (found := sha256_of(state)) != sha256:
                self._applied(state, reader, applied.tensors, reverse=not reverse)
                raise Corrupt("version after the delta", f"sha256 {sha256}", f"sha256 {found}")
        except WrongBase:
            self.put(state, tensors)
            raise
        except Exception as error:
            check_state(state, tensors, cause=error)
            self.put(state, tensors)
            raise
        self.put(state, applied.tensors)
        return applied.changed

    def take(self) -> tuple[State, tuple[TensorSpec, ...]]:
        """Hand the tensors out to be written to, and their specs; nothing is held then."""
        taken = self._state, self._tensors
        self._state, self._tensors, self._digest = MappingProxyType({}), (), ""
        return taken

    def put(self, state: State, tensors: Sequence[TensorSpec]) -> None:
        """Hold `state`; it is proved to be what `tensors` describes."""
        self._state = MappingProxyType(dict(state))
        self._tensors = tuple(tensors)
        self._digest = version_digest(tensors)

    def _applied(
        self, state: State, reader: DeltaReader, tensors: Sequence[TensorSpec], *, reverse: bool
    ) -> deltas.Applied:
        return deltas.apply(state, reader, reverse=reverse, tensors=tensors, threads=self.threads)


def check_state(
    state: State, tensors: Sequence[TensorSpec], *, cause: BaseException | None = None
) -> None:
    """Read every element of `state` and compare with its specs.

    Raises:
        Corrupt: they disagree, because of `cause`.
    """
    found = {spec.name: spec for spec in specs(state)}
    for spec in tensors:
        if found.get(spec.name) != spec:
            raise Corrupt(
                f"copy of tensor {spec.name!r}", spec.digest, found[spec.name].digest
            ) from cause
