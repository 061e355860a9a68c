"""Deltas: patches as bytes. Lossless on the bits of the published dtype.

Layout of codec `plain-1`: `LWD1`, u4 header length, msgpack header `{base, tensors}`, then per
tensor its positions (absent when dense) and its values, little-endian, each padded to 8 bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from typing import Any, cast

import msgpack
import numpy as np
import torch
from pydantic import Field, ValidationError

from shared.weights.bits import bits_dtype, dtype_of
from shared.weights.errors import Corrupt
from shared.weights.patches import Applied, Patch, TensorPatch, apply_patch, diff
from shared.wire.base import Part
from shared.wire.weights import TensorSpec

CODEC = "plain-1"
"""Name of this encoding in `Artefact.encoding`."""

_MAGIC = b"LWD1"
_PREFIX = struct.Struct("<4sI")
_ALIGN = 8


class _TensorHead(Part):
    """One tensor in the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    position_bytes: int = Field(ge=0, le=8)
    """Width of one position: 4 or 8; 0 = dense."""
    count: int = Field(ge=0)
    """Number of values."""


class _Head(Part):
    """The header."""

    base: str
    tensors: tuple[_TensorHead, ...]


def encode(
    old: Mapping[str, torch.Tensor],
    new: Mapping[str, torch.Tensor],
    *,
    tensors: Iterable[TensorSpec] | None = None,
) -> bytes:
    """Return the delta that takes `old` to `new`; `tensors` are the specs of `old` if known.

    Raises:
        WrongBase: names, shapes or dtypes disagree.
    """
    return to_bytes(diff(old, new, tensors=tensors))


def apply(
    state: Mapping[str, torch.Tensor],
    delta: bytes,
    *,
    tensors: Iterable[TensorSpec] | None = None,
) -> Applied:
    """Return the state after `delta`; `state` itself is not touched.

    Args:
        state: the base.
        delta: from `encode`.
        tensors: specs of `state` when they are known and checked; computed otherwise.

    Raises:
        WrongBase: made for another base.
        Corrupt: not a delta of this codec.
    """
    return apply_patch(state, from_bytes(delta), tensors=tensors)


def to_bytes(patch: Patch) -> bytes:
    """Serialise a patch."""
    heads: list[dict[str, Any]] = []
    body: list[bytes] = []
    for piece in patch.tensors:
        heads.append(
            {
                "name": piece.name,
                "dtype": piece.dtype,
                "shape": piece.shape,
                "position_bytes": 0 if piece.positions is None else piece.positions.itemsize,
                "count": len(piece.values),
            }
        )
        if piece.positions is not None:
            body += _padded(piece.positions.tobytes())
        body += _padded(piece.values.tobytes())
    head = cast(bytes, msgpack.packb({"base": patch.base, "tensors": heads}, use_bin_type=True))
    head += b"\0" * (-(_PREFIX.size + len(head)) % _ALIGN)
    return b"".join([_PREFIX.pack(_MAGIC, len(head)), head, *body])


def from_bytes(delta: bytes) -> Patch:
    """Parse a delta; its arrays are views of `delta`.

    Raises:
        Corrupt: not a delta of this codec, or truncated.
    """
    if len(delta) < _PREFIX.size or not delta.startswith(_MAGIC):
        raise Corrupt("delta", f"codec {CODEC}", f"{delta[:4]!r}, {len(delta)} bytes")
    (_, head_bytes) = _PREFIX.unpack_from(delta)
    start = _PREFIX.size + head_bytes
    head = _head(delta[_PREFIX.size : start])
    tensors: list[TensorPatch] = []
    for piece in head.tensors:
        try:
            value_dtype = bits_dtype(dtype_of(piece.dtype).itemsize)
        except ValueError as error:
            raise Corrupt(f"delta of tensor {piece.name!r}", "a known dtype", str(error)) from error
        positions = None
        if piece.position_bytes:
            if piece.position_bytes not in (4, 8):
                raise Corrupt("delta", "positions of 4 or 8 bytes", str(piece.position_bytes))
            positions, start = _array(delta, start, bits_dtype(piece.position_bytes), piece.count)
        values, start = _array(delta, start, value_dtype, piece.count)
        tensors.append(TensorPatch(piece.name, piece.dtype, piece.shape, positions, values))
    if start != len(delta):
        raise Corrupt("delta", f"{start} bytes", f"{len(delta)} bytes")
    return Patch(base=head.base, tensors=tuple(tensors))


def _head(packed: bytes) -> _Head:
    try:
        unpacker = msgpack.Unpacker(raw=False, use_list=False)
        unpacker.feed(packed)
        return _Head.model_validate(unpacker.unpack())
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False, include_context=False)[0]
        raise Corrupt("delta header", "names, dtypes, shapes", str(problem["msg"])) from error
    except Exception as error:
        raise Corrupt("delta header", "msgpack", f"{type(error).__name__}: {error}") from error


def _array(
    delta: bytes, start: int, dtype: np.dtype[Any], count: int
) -> tuple[np.ndarray[Any, np.dtype[Any]], int]:
    num_bytes = count * dtype.itemsize
    if start + num_bytes > len(delta):
        raise Corrupt("delta", f"at least {start + num_bytes} bytes", f"{len(delta)} bytes")
    values = np.frombuffer(delta, dtype=dtype, count=count, offset=start)
    return values, start + num_bytes + (-num_bytes % _ALIGN)


def _padded(data: bytes) -> list[bytes]:
    padding = -len(data) % _ALIGN
    return [data, b"\0" * padding] if padding else [data]
