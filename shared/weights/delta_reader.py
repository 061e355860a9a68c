"""Reads a delta without trusting a byte of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Protocol, cast

import msgpack
from pydantic import Field, ValidationError

from shared.weights.bits import dtype_of
from shared.weights.blocks import (
    BLOCK,
    BLOCK_ELEMENTS,
    CODEC,
    END,
    MAGIC,
    PREFIX,
    TRAILER,
    unpack,
)
from shared.weights.errors import Corrupt
from shared.weights.kernels.base import FORMS, Coded, Form
from shared.wire.base import Part

MAX_HEADER_BYTES = 64 * 1024 * 1024
"""A header names tensors: beyond this it is none."""


class Source(Protocol):
    """Bytes that can be read anywhere."""

    @property
    def size(self) -> int:
        """Number of bytes."""
        ...

    def read(self, offset: int, num_bytes: int) -> memoryview | bytes:
        """Return exactly these bytes; the range lies within the source. Thread-safe."""
        ...


class BytesSource:
    """A `Source` in memory."""

    def __init__(self, data: bytes | memoryview) -> None:
        self._data = memoryview(data)

    @property
    def size(self) -> int:
        """Number of bytes."""
        return len(self._data)

    def read(self, offset: int, num_bytes: int) -> memoryview:
        """Return a view."""
        return self._data[offset : offset + num_bytes]


@dataclass(frozen=True, slots=True)
class Block:
    """Where one block lies, and in how many elements it changes."""

    tensor_index: int
    """Into `DeltaReader.tensors`."""
    start: int
    """Flat index of its first element."""
    length: int
    """Elements."""
    form: Form
    count: int
    """Changed elements."""
    width: int
    """Bytes per element."""
    body_offset: int
    body_bytes: int
    read: Callable[[int, int], memoryview] = field(repr=False)

    def coded(self) -> Coded:
        """Read and decompress; memory is bounded by `length`, whatever the bytes claim.

        Raises:
            Corrupt: not such a block.
        """
        body = self.read(self.body_offset, self.body_bytes)
        return unpack(body, self.form, self.width, self.count, self.length)


class _TensorHead(Part):
    name: str
    dtype: str
    shape: tuple[Annotated[int, Field(ge=0)], ...] = Field(max_length=64)


class _Head(Part):
    base: str = Field(pattern=r"^[0-9a-f]{32}$")
    tensors: tuple[_TensorHead, ...]


class DeltaReader:
    """A delta: header, trailer and the places of its blocks, checked; bodies are read on demand."""

    base: str
    """Version digest of the state it applies to."""
    target: str
    """Version digest of the state it makes of it."""
    tensors: tuple[tuple[str, str, tuple[int, ...]], ...]
    """(name, safetensors dtype code, shape) of the whole model."""

    def __init__(self, source: Source) -> None:
        """Read header, trailer and block heads.

        Raises:
            Corrupt: not a delta of this codec, or truncated.
        """
        self._source = source
        head, first = self._head()
        self.base = head.base
        self.tensors = tuple((t.name, t.dtype, t.shape) for t in head.tensors)
        self._blocks = tuple(self._scan(first))

    def blocks(self) -> Iterator[Block]:
        """Yield the blocks, ascending by (tensor, start)."""
        yield from self._blocks

    @property
    def num_changed(self) -> int:
        """Changed elements."""
        return sum(block.count for block in self._blocks)

    def _head(self) -> tuple[_Head, int]:
        magic, head_bytes = cast(
            tuple[bytes, int], PREFIX.unpack(self._read(0, PREFIX.size, "prefix"))
        )
        if magic != MAGIC:
            raise Corrupt("delta", f"codec {CODEC}", repr(magic))
        if head_bytes > MAX_HEADER_BYTES:
            raise Corrupt("delta header", f"up to {MAX_HEADER_BYTES} bytes", str(head_bytes))
        head = _parsed_head(self._read(PREFIX.size, head_bytes, "header"))
        names = {t.name for t in head.tensors}
        if len(names) != len(head.tensors):
            raise Corrupt("delta header", "every tensor once", "a repeated name")
        return head, PREFIX.size + head_bytes

    def _scan(self, at: int) -> Iterator[Block]:
        sizes = [(math.prod(shape), _width(name, code)) for name, code, shape in self.tensors]
        end = self._source.size - TRAILER.size
        position = (0, 0)
        while at < end:
            index, start, length, count, form, body_bytes = cast(
                tuple[int, int, int, int, int, int],
                BLOCK.unpack(self._read(at, BLOCK.size, "block")),
            )
            at += BLOCK.size
            if not (index < len(sizes) and position <= (index, start)):
                raise Corrupt("delta", "ascending blocks", f"tensor {index}, element {start}")
            elements, width = sizes[index]
            if not (1 <= count <= length <= min(BLOCK_ELEMENTS, elements - start)):
                raise Corrupt(
                    f"block of tensor {self.tensors[index][0]!r}",
                    f"a part of {elements} elements",
                    f"{count} of {length} from {start} on",
                )
            if form >= len(FORMS):
                raise Corrupt("block", f"one of {len(FORMS)} forms", str(form))
            if at + body_bytes > end:
                raise Corrupt("delta", f"{at + body_bytes} bytes of blocks", f"{end}")
            yield Block(index, start, length, FORMS[form], count, width, at, body_bytes, self._read)
            position = (index, start + length)
            at += body_bytes
        magic, target = cast(tuple[bytes, bytes], TRAILER.unpack(self._read(at, TRAILER.size)))
        if magic != END or at != end:
            raise Corrupt("delta", "a trailer", repr(magic))
        if not all(c in b"0123456789abcdef" for c in target):
            raise Corrupt("delta trailer", "a version digest", repr(target))
        self.target = target.decode()

    def _read(self, offset: int, num_bytes: int, what: str = "block") -> memoryview:
        if offset + num_bytes > self._source.size:
            raise Corrupt(f"delta {what}", f"{offset + num_bytes} bytes", f"{self._source.size}")
        data = memoryview(self._source.read(offset, num_bytes))
        if len(data) != num_bytes:
            raise Corrupt(f"delta {what}", f"{num_bytes} bytes", f"{len(data)}")
        return data


def _parsed_head(packed: memoryview) -> _Head:
    try:
        unpacked = cast(Any, msgpack.unpackb(packed, raw=False, use_list=False))
        return _Head.model_validate(unpacked)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False, include_context=False)[0]
        raise Corrupt("delta header", "names, dtypes, shapes", str(problem["msg"])) from error
    except (ValueError, TypeError, RecursionError) as error:
        raise Corrupt("delta header", "msgpack", f"{type(error).__name__}: {error}") from error


def _width(name: str, code: str) -> int:
    try:
        return dtype_of(code).itemsize
    except ValueError as error:
        raise Corrupt(f"delta of tensor {name!r}", "a known dtype", repr(code)) from error
