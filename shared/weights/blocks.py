"""The bytes of a delta, record by record.

    prefix   "LWB1", u4 length of the header
    header   msgpack {base, tensors: [{name, dtype, shape}]}
    blocks   u4 tensor, u8 start, u4 elements, u4 changed, u1 form, u4 length of the body, body
    trailer  "LWBT", target

Integers are little-endian; base and target are version digests. Blocks ascend by (tensor, start),
do not overlap, and hold `BLOCK_ELEMENTS` elements at most. A body is its form's streams
(`kernels/base.py`), each u1 packing (0 raw, 1 zstd), u4 stored length, stored bytes.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator, Sequence
from typing import cast

import msgpack
import numpy as np
import zstandard

from shared.weights.errors import Corrupt
from shared.weights.kernels.base import (
    FORMS,
    Bits,
    Bytes,
    Coded,
    Form,
    Kernels,
    stream_limits,
)
from shared.wire.weights import TensorSpec

CODEC = "blocks-1"
"""Name of this encoding in `Artefact.encoding`."""

BLOCK_ELEMENTS = 1 << 21
"""Elements of a tensor that are coded together: what a core works on, and what memory is for."""

PREFIX = struct.Struct("<4sI")
BLOCK = struct.Struct("<IQIIBI")
TRAILER = struct.Struct("<4s32s")
MAGIC, END = b"LWB1", b"LWBT"
_STREAM = struct.Struct("<BI")
_RAW, _ZSTD = 0, 1

_SMALL = 32
"""Streams up to so many bytes are stored raw: a zstd frame has a header and a checksum, too."""
_SAMPLE = 2048
_WORTH = 0.9
"""What zstd does not take below this share is stored raw: that is cheaper on both sides."""


class BlockWriter:
    """Writes the records of one delta; `block` may be called from several threads.

    The caller puts the records in order: header, blocks ascending by (tensor, start), trailer.
    """

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels

    def header(self, base: str, specs: Sequence[TensorSpec]) -> bytes:
        """Return prefix and header: `base` is the version digest, `specs` the order of tensors."""
        tensors = [{"name": s.name, "dtype": s.dtype, "shape": s.shape} for s in specs]
        head = cast(bytes, msgpack.packb({"base": base, "tensors": tensors}, use_bin_type=True))
        return PREFIX.pack(MAGIC, len(head)) + head

    def block(
        self, tensor_index: int, start: int, old_bits: Bits, new_bits: Bits
    ) -> tuple[bytes, int] | None:
        """Return (record, what the tensor's digest gains), None when nothing changed.

        Args:
            tensor_index: into the header's tensors.
            start: flat index of the first element.
            old_bits: [N], N <= BLOCK_ELEMENTS.
            new_bits: [N].
        """
        length = len(old_bits)
        if length > BLOCK_ELEMENTS or length != len(new_bits):
            raise ValueError(f"a block of {length} and {len(new_bits)} elements")
        coded = self._kernels.encode(old_bits, new_bits, start)
        if coded is None:
            return None
        body = _packed_streams(coded)
        num_bytes = sum(map(len, body))
        form = FORMS.index(coded.form)
        head = BLOCK.pack(tensor_index, start, length, coded.count, form, num_bytes)
        return b"".join([head, *body]), coded.digest_change

    def trailer(self, target: str) -> bytes:
        """Return the last record: `target` is the version digest."""
        return TRAILER.pack(END, target.encode())


def spans(start: int, length: int) -> Iterator[tuple[int, int]]:
    """Cut `length` elements from `start` on into blocks: (start, length) each."""
    for offset in range(0, length, BLOCK_ELEMENTS):
        yield start + offset, min(BLOCK_ELEMENTS, length - offset)


def unpack(body: memoryview, form: Form, width: int, count: int, length: int) -> Coded:
    """Return the streams of a block's body.

    Memory is bounded by the block's size, whatever the bytes claim.

    Raises:
        Corrupt: not such a body.
    """
    streams: list[Bytes] = []
    at = 0
    for limit in stream_limits(form, width, count, length):
        if at + _STREAM.size > len(body):
            raise Corrupt("block", "another stream", "the end of the body")
        packing, stored = _STREAM.unpack_from(body, at)
        at += _STREAM.size
        if at + stored > len(body):
            raise Corrupt("block", f"a stream of {stored} bytes", f"{len(body) - at}")
        streams.append(_unpacked(body[at : at + stored], packing, limit))
        at += stored
    if at != len(body):
        raise Corrupt("block", f"a body of {at} bytes", f"{len(body)}")
    return Coded(form, count, streams, 0)


def _packed_streams(coded: Coded) -> list[bytes | memoryview]:
    parts: list[bytes | memoryview] = []
    for stream in coded.streams:
        packing, stored = _packed(stream)
        parts += (_STREAM.pack(packing, len(stored)), stored)
    return parts


def _packed(stream: Bytes) -> tuple[int, bytes | memoryview]:
    if len(stream) <= _SMALL:
        return _RAW, stream.data
    compressor = _zstd.compressor
    if len(stream) > 2 * _SAMPLE:
        middle = (len(stream) - _SAMPLE) // 2
        sample = compressor.compress(stream[middle : middle + _SAMPLE].data)
        if len(sample) > _WORTH * _SAMPLE:
            return _RAW, stream.data
    frame = compressor.compress(stream.data)
    return (_ZSTD, frame) if len(frame) < len(stream) else (_RAW, stream.data)


def _unpacked(stored: memoryview, packing: int, limit: int) -> Bytes:
    if packing == _RAW:
        if len(stored) > limit:
            raise Corrupt("block", f"a stream of {limit} bytes", f"{len(stored)}")
        return np.frombuffer(stored, np.uint8)
    if packing != _ZSTD:
        raise Corrupt("block", "packing 0 or 1", str(packing))
    try:
        claimed = zstandard.get_frame_parameters(stored).content_size
        if claimed > limit:  # unknown sizes are reported as 2^64 - 1
            raise Corrupt("block", f"a stream of {limit} bytes", f"a frame of {claimed}")
        data = _zstd.decompressor.decompress(stored, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise Corrupt("block", "a zstd frame", str(error)) from error
    return np.frombuffer(data, np.uint8)


class _Zstd(threading.local):
    """Contexts are not thread-safe, and cost more than a block to make."""

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(level=1, write_checksum=True)
        self.decompressor = zstandard.ZstdDecompressor()


_zstd = _Zstd()
