"""Patches: what differs between two states, element by element, reversible.

Shapes: N elements of one tensor, K of them changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from shared.weights.bits import Bits, from_bits, to_bits
from shared.weights.digests import bits_digest, specs, to_hex, updated, version_digest
from shared.weights.errors import Corrupt, WrongBase
from shared.wire.weights import TensorSpec


@dataclass(frozen=True)
class TensorPatch:
    """What one tensor becomes."""

    name: str
    dtype: str
    """safetensors code."""
    shape: tuple[int, ...]
    positions: npt.NDArray[Any] | None
    """u4[K] or u8[K], strictly ascending flat indices; None: all N elements (dense)."""
    values: Bits
    """New bits, [K] or [N]."""


@dataclass(frozen=True)
class Patch:
    """Takes exactly one version to another one."""

    base: str
    """`version_digest` of the state it applies to."""
    tensors: tuple[TensorPatch, ...]
    """Tensors that are not listed do not change."""


@dataclass(frozen=True)
class Applied:
    """A state after a patch."""

    state: Mapping[str, torch.Tensor]
    """Unchanged tensors are those of the base; changed ones are new memory."""
    tensors: tuple[TensorSpec, ...]
    """Its specs, digests updated from the patch."""
    changed: frozenset[str]
    undo: Patch
    """Takes `state` back to the base; applying it yields the redo."""

    @property
    def digest(self) -> str:
        """Version digest of the new state."""
        return version_digest(self.tensors)


def diff(
    old: Mapping[str, torch.Tensor],
    new: Mapping[str, torch.Tensor],
    *,
    tensors: Iterable[TensorSpec] | None = None,
) -> Patch:
    """Return what takes `old` to `new`, sparse or dense per tensor, whichever is smaller.

    Args:
        old: the base.
        new: same names, shapes and dtypes.
        tensors: specs of `old`, when they are known.

    Raises:
        WrongBase: names, shapes or dtypes disagree.
    """
    if set(old) != set(new):
        odd = sorted(set(old) ^ set(new))[0]
        raise WrongBase(f"tensor {odd!r}", _presence(odd in new), _presence(odd in old))
    changed: list[TensorPatch] = []
    base = tuple(tensors) if tensors is not None else specs(old)
    for spec in base:
        patch = _diff_tensor(spec, old[spec.name], new[spec.name])
        if patch is not None:
            changed.append(patch)
    return Patch(base=version_digest(base), tensors=tuple(changed))


def apply_patch(
    state: Mapping[str, torch.Tensor],
    patch: Patch,
    *,
    tensors: Iterable[TensorSpec] | None = None,
) -> Applied:
    """Return the state after `patch`; `state` itself is not touched.

    Args:
        state: the base.
        patch: made for exactly this base.
        tensors: specs of `state` when they are known and checked; computed otherwise.

    Raises:
        WrongBase: the patch was made for another base.
        Corrupt: positions or values that cannot belong to their tensor.
    """
    known = {s.name: s for s in (tensors if tensors is not None else specs(state))}
    held = version_digest(known.values())
    if held != patch.base:
        raise WrongBase("version digest", patch.base, held)
    result = dict(state)
    undo: list[TensorPatch] = []
    for piece in patch.tensors:
        spec = known.get(piece.name)
        if spec is None or (spec.dtype, spec.shape) != (piece.dtype, piece.shape):
            theirs = f"{piece.dtype}{list(piece.shape)}"
            ours = "absent" if spec is None else f"{spec.dtype}{list(spec.shape)}"
            raise WrongBase(f"tensor {piece.name!r}", theirs, ours)
        new_bits, digest, inverse = _apply_tensor(to_bits(state[piece.name]), piece, spec.digest)
        result[piece.name] = from_bits(new_bits, piece.dtype, piece.shape)
        known[piece.name] = spec.model_copy(update={"digest": to_hex(digest)})
        undo.append(inverse)
    after = tuple(known[name] for name in sorted(known))
    return Applied(
        state=MappingProxyType(result),
        tensors=after,
        changed=frozenset(p.name for p in patch.tensors),
        undo=Patch(base=version_digest(after), tensors=tuple(undo)),
    )


def _diff_tensor(spec: TensorSpec, old: torch.Tensor, new: torch.Tensor) -> TensorPatch | None:
    if old.dtype != new.dtype or old.shape != new.shape:
        raise WrongBase(
            f"tensor {spec.name!r}",
            f"{new.dtype}{list(new.shape)}",
            f"{old.dtype}{list(old.shape)}",
        )
    old_bits, new_bits = to_bits(old), to_bits(new)
    (positions,) = np.nonzero(old_bits != new_bits)
    if not len(positions):
        return None
    narrow = positions.astype(np.uint32 if len(new_bits) <= 1 << 32 else np.uint64)
    if narrow.nbytes + len(narrow) * new_bits.itemsize >= new_bits.nbytes:
        return TensorPatch(spec.name, spec.dtype, spec.shape, None, new_bits)
    return TensorPatch(spec.name, spec.dtype, spec.shape, narrow, new_bits[positions])


def _apply_tensor(old: Bits, piece: TensorPatch, digest_hex: str) -> tuple[Bits, int, TensorPatch]:
    """Return (new bits, their digest, the patch back)."""
    where = f"patch of tensor {piece.name!r}"
    positions, values = piece.positions, piece.values
    if values.dtype != old.dtype:
        raise Corrupt(where, f"{old.itemsize}-byte elements", f"{values.itemsize}-byte elements")
    if positions is None:
        if len(values) != len(old):
            raise Corrupt(where, f"{len(old)} values", f"{len(values)}")
        back = TensorPatch(piece.name, piece.dtype, piece.shape, None, old)
        return values.copy(), bits_digest(values), back
    if len(positions) != len(values):
        raise Corrupt(where, f"{len(positions)} values", f"{len(values)}")
    if len(positions) and int(positions[-1]) >= len(old):
        raise Corrupt(where, f"positions below {len(old)}", str(int(positions[-1])))
    if not bool(np.all(positions[1:] > positions[:-1])):
        raise Corrupt(where, "ascending positions", "another order")
    replaced = old[positions]
    new = old.copy()
    new[positions] = values
    back = TensorPatch(piece.name, piece.dtype, piece.shape, positions, replaced)
    return new, updated(int(digest_hex, 16), positions, replaced, values), back


def _presence(present: bool) -> str:
    return "present" if present else "absent"
