"""Digests of tensors and versions.

The tensor digest is a sum over elements of a mixed hash of (flat index, bits), modulo 2^64. A sum
has no order, so that it follows a patch without reading the unchanged elements, and shards of a
tensor add up. It guards against accidents, not against an adversary; the SHA-256 is for that.

Shapes: N elements of one tensor, K of them changed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from shared.weights.bits import Bits, bits_dtype, code_of, dtype_of, to_bits
from shared.wire.weights import TensorSpec

MASK = (1 << 64) - 1
"""Digests live modulo 2^64."""

# 2^64 / golden ratio, and the two multipliers of splitmix64 (Steele et al., OOPSLA 2014).
_INDEX_KEY = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_29, _32 = np.uint64(29), np.uint64(32)

_BLOCK = 16384
"""Elements hashed at a time: both scratch rows stay in the second-level cache."""
_ORDINALS: npt.NDArray[np.uint64] = np.arange(1, _BLOCK + 1, dtype=np.uint64)


def tensor_digest(tensor: torch.Tensor, *, offset: int = 0) -> int:
    """Return the additive digest (u64) of a tensor, or of a flat shard that starts at `offset`."""
    return bits_digest(to_bits(tensor), offset=offset)


def bits_digest(bits: Bits, *, offset: int = 0) -> int:
    """Return the additive digest of consecutive elements bits[N], the first at `offset`."""
    total = 0
    for start in range(0, len(bits), _BLOCK):
        block = bits[start : start + _BLOCK]
        total += _mixed_sum(_ORDINALS[: len(block)] + np.uint64(offset + start), block)
    return total & MASK


def contributions(positions: npt.NDArray[Any], bits: Bits) -> int:
    """Return what elements bits[K] at flat indices positions[K] add to their tensor's digest."""
    total = 0
    for start in range(0, len(bits), _BLOCK):
        indices = positions[start : start + _BLOCK].astype(np.uint64)
        indices += np.uint64(1)
        total += _mixed_sum(indices, bits[start : start + _BLOCK])
    return total & MASK


def updated(digest: int, positions: npt.NDArray[Any], old_bits: Bits, new_bits: Bits) -> int:
    """Return the digest after elements at `positions` went from `old_bits` to `new_bits`."""
    replaced = contributions(positions, old_bits)
    return (digest - replaced + contributions(positions, new_bits)) & MASK


def combined(digests: Iterable[int]) -> int:
    """Return the digest of a tensor from those of its shards."""
    return sum(digests) & MASK


def to_hex(digest: int) -> str:
    """Return the wire form: 16 hex digits."""
    return f"{digest:016x}"


def spec(name: str, tensor: torch.Tensor, digest: int | None = None) -> TensorSpec:
    """Describe one tensor; `digest` when it is known already."""
    known = tensor_digest(tensor) if digest is None else digest
    return TensorSpec(
        name=name,
        dtype=code_of(tensor.dtype),
        shape=tuple(tensor.shape),
        digest=to_hex(known),
    )


def specs(state: Mapping[str, torch.Tensor]) -> tuple[TensorSpec, ...]:
    """Describe a whole state, in name order."""
    return tuple(spec(name, state[name]) for name in sorted(state))


def version_digest(tensors: Iterable[TensorSpec]) -> str:
    """Return the digest of a version: blake2b-128 over its tensor specs in name order, hex.

    Hashed are the lines `name dtype d0,d1,... digest`, each ended by a newline, in UTF-8.
    """
    digest = hashlib.blake2b(digest_size=16)
    for tensor in sorted(tensors, key=lambda t: t.name):
        shape = ",".join(str(n) for n in tensor.shape)
        digest.update(f"{tensor.name} {tensor.dtype} {shape} {tensor.digest}\n".encode())
    return digest.hexdigest()


def sha256_of(state: Mapping[str, torch.Tensor]) -> str:
    """Return the SHA-256 over the canonical bytes, hex.

    Hashed are, per tensor in name order, the line `name dtype d0,d1,...` ended by a newline, in
    UTF-8, and then the elements, little-endian in C order.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name]
        shape = ",".join(str(n) for n in tensor.shape)
        digest.update(f"{name} {code_of(tensor.dtype)} {shape}\n".encode())
        digest.update(to_bits(tensor).astype(bits_dtype(tensor.element_size()), copy=False).data)
    return digest.hexdigest()


def num_bytes(state: Mapping[str, torch.Tensor]) -> int:
    """Return the size of all tensors."""
    return sum(t.numel() * t.element_size() for t in state.values())


def specs_bytes(tensors: Iterable[TensorSpec]) -> int:
    """Return the size of a version from its specs."""
    return sum(math.prod(t.shape) * dtype_of(t.dtype).itemsize for t in tensors)


def _mixed_sum(ordinals: npt.NDArray[np.uint64], bits: Bits) -> int:
    """Sum the hashes of (ordinal, bits) modulo 2^64; `ordinals` is scratch and overwritten."""
    key = ordinals
    key *= _INDEX_KEY
    shifted = key >> _29
    key ^= shifted
    key += bits
    key *= _MIX_1
    np.right_shift(key, _32, out=shifted)
    key ^= shifted
    key *= _MIX_2
    np.right_shift(key, _29, out=shifted)
    key ^= shifted
    return int(key.sum(dtype=np.uint64))
