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

import numpy.typing as npt
import torch

from shared.weights.bits import Bits, bits_dtype, code_of, dtype_of, to_bits
from shared.weights.kernels.choice import kernels_for
from shared.weights.kernels.reference import MASK, contributions
from shared.wire.weights import Manifest, TensorSpec


def tensor_digest(tensor: torch.Tensor, *, offset: int = 0) -> int:
    """Return the additive digest (u64) of a tensor, or of a flat shard that starts at `offset`."""
    return bits_digest(to_bits(tensor), offset=offset)


def bits_digest(bits: Bits, *, offset: int = 0) -> int:
    """Return the additive digest of consecutive elements bits[N], the first at `offset`."""
    return kernels_for(bits.nbytes).digest(bits, offset)


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
    kernels = kernels_for(num_bytes(state))
    return tuple(
        spec(name, state[name], kernels.digest(to_bits(state[name]), 0)) for name in sorted(state)
    )


def version_digest(tensors: Iterable[TensorSpec]) -> str:
    """Return the digest of a version: blake2b-128 over its tensor specs in name order, hex.

    Hashed are the lines `name dtype d0,d1,... digest`, each ended by a newline, in UTF-8.
    """
    digest = hashlib.blake2b(digest_size=16)
    for tensor in sorted(tensors, key=lambda t: t.name):
        shape = ",".join(str(n) for n in tensor.shape)
        digest.update(f"{tensor.name} {tensor.dtype} {shape} {tensor.digest}\n".encode())
    return digest.hexdigest()


def verify_same(manifest: Manifest, state: Mapping[str, torch.Tensor]) -> bool:
    """Return whether `state` is, bit for bit, the version that `manifest` describes.

    A restored learner asks this of every version it re-derives: the same bytes keep their number
    and are not published again.
    """
    return version_digest(specs(state)) == manifest.digest


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
