"""Keyframes: a whole version as a safetensors file, written and read piece by piece.

Layout: u8 header length, little-endian; JSON header `{name: {dtype, shape, data_offsets}}`, padded
with spaces to 8 bytes; the tensors' bytes one after the other, little-endian, C order.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import safetensors.torch as st
import torch
from safetensors import SafetensorError

from shared.weights.bits import Bits, bits_dtype, code_of, dtype_of, to_bits
from shared.weights.errors import Corrupt

ENCODING = "safetensors"
"""Name of this encoding in `Artefact.encoding`."""

PIECE_BYTES = 4 * 1024 * 1024

MAX_HEADER_BYTES = 64 * 1024 * 1024
"""About half a million tensors; a longer header is taken for nonsense."""

_LENGTH = struct.Struct("<Q")
_METADATA = "__metadata__"
_FIELDS = {"dtype", "shape", "data_offsets"}
_MAX_DIMENSIONS = 64

TensorHead = tuple[str, str, tuple[int, ...]]
"""Name, dtype code, shape."""


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive elements of one tensor."""

    name: str
    start: int
    """Flat index of the first element."""
    bits: Bits
    """[n]; may be a view of what was fed, which is gone once the next piece is."""


class SafetensorsPieces:
    """The safetensors file of a state as an iterable of pieces, tensors in name order.

    A piece is at most `piece_bytes` long and memory of its own. Tensors that share memory are
    written separately; the state must not change while it is read.

    Raises:
        ValueError: a dtype or a name that is never published.
    """

    def __init__(self, state: Mapping[str, torch.Tensor], piece_bytes: int = PIECE_BYTES) -> None:
        self._state = state
        self._piece_bytes = max(8, piece_bytes)
        head: dict[str, Any] = {_METADATA: {"format": "pt"}}
        offset = 0
        for name in sorted(state):
            if name == _METADATA:
                raise ValueError(f"a tensor cannot be called {name!r}")
            tensor = state[name]
            end = offset + tensor.numel() * tensor.element_size()
            head[name] = {
                "dtype": code_of(tensor.dtype),
                "shape": list(tensor.shape),
                "data_offsets": [offset, end],
            }
            offset = end
        text = json.dumps(head, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._head = _LENGTH.pack(len(text)) + text
        self.num_bytes = len(self._head) + offset
        """Of the whole file."""

    def __iter__(self) -> Iterator[bytes]:
        step = self._piece_bytes
        for start in range(0, len(self._head), step):
            yield self._head[start : start + step]
        for name in sorted(self._state):
            # One tensor at a time: what is not contiguous or not on the CPU is copied there whole.
            data = to_bits(self._state[name]).view(np.uint8)
            for start in range(0, len(data), step):
                yield data[start : start + step].tobytes()


class SafetensorsFeed:
    """Reads a safetensors file as it arrives, in pieces of any size, in bounded memory.

    Args:
        num_bytes: length of the whole file when it is known: a header that promises another is
            refused before anything is allocated for it.
    """

    def __init__(self, num_bytes: int | None = None) -> None:
        self.tensors: tuple[TensorHead, ...] | None = None
        """In file order; None until the header is complete."""
        self._num_bytes = num_bytes
        self._head = bytearray()
        self._sizes: list[int] = []
        """Bytes of every tensor."""
        self._index = 0
        """Tensor that the next byte belongs to."""
        self._inside = 0
        """Bytes of it read, whole elements only."""
        self._partial = bytearray()
        """The first bytes of an element whose rest has not arrived."""

    def feed(self, data: bytes | bytearray | memoryview) -> list[Run]:
        """Take the next piece; return the elements that it completes, in file order.

        Raises:
            Corrupt: not a safetensors file, or more of it than its header promises.
        """
        view = memoryview(data).cast("B")
        if self.tensors is None:
            view = self._feed_head(view)
            if self.tensors is None:
                return []
        runs: list[Run] = []
        self._skip_complete()
        while len(view):
            if self._index == len(self.tensors):
                raise Corrupt("keyframe", "the end of the file", f"{len(view)} bytes more")
            view = self._take(view, runs)
            self._skip_complete()
        return runs

    def close(self) -> None:
        """End the file.

        Raises:
            Corrupt: it is not complete.
        """
        if self.tensors is None:
            raise Corrupt("keyframe", "a header", f"the end after {len(self._head)} bytes")
        self._skip_complete()
        if self._index < len(self.tensors):
            name = self.tensors[self._index][0]
            found = self._inside + len(self._partial)
            raise Corrupt(
                f"keyframe tensor {name}", f"{self._sizes[self._index]} bytes", f"{found} bytes"
            )

    def _feed_head(self, view: memoryview) -> memoryview:
        """Gather the header; return what follows it."""
        view = self._gather(view, _LENGTH.size)
        if len(self._head) < _LENGTH.size:
            return view
        (length,) = _LENGTH.unpack_from(self._head)
        if not 2 <= length <= MAX_HEADER_BYTES:
            raise Corrupt("keyframe", f"a header of 2..{MAX_HEADER_BYTES} bytes", f"{length}")
        view = self._gather(view, _LENGTH.size + length)
        if len(self._head) == _LENGTH.size + length:
            heads, self._sizes = _parse_head(bytes(self._head[_LENGTH.size :]))
            promised = len(self._head) + sum(self._sizes)
            if self._num_bytes is not None and promised != self._num_bytes:
                raise Corrupt("keyframe", f"{self._num_bytes} bytes", f"a header for {promised}")
            self.tensors = heads
        return view

    def _gather(self, view: memoryview, until: int) -> memoryview:
        missing = max(0, until - len(self._head))
        self._head += view[:missing]
        return view[missing:]

    def _take(self, view: memoryview, runs: list[Run]) -> memoryview:
        """Read elements of the current tensor; return what follows them."""
        assert self.tensors is not None
        (name, code, _) = self.tensors[self._index]
        width = dtype_of(code).itemsize
        if self._partial or len(view) < width:
            missing = width - len(self._partial)
            self._partial += view[:missing]
            view = view[missing:]
            if len(self._partial) == width:
                self._emit(name, memoryview(bytes(self._partial)), width, runs)
                self._partial.clear()
            return view
        left = self._sizes[self._index] - self._inside
        whole = min(left, len(view) - len(view) % width)
        self._emit(name, view[:whole], width, runs)
        return view[whole:]

    def _emit(self, name: str, data: memoryview, width: int, runs: list[Run]) -> None:
        bits = np.frombuffer(data, bits_dtype(width))
        # Compiled kernels and torch want aligned elements; a header or a narrow tensor before
        # this one shifts them.
        if not bits.flags.aligned:
            bits = bits.copy()
        runs.append(Run(name, self._inside // width, bits))
        self._inside += len(data)

    def _skip_complete(self) -> None:
        while self._index < len(self._sizes) and self._inside == self._sizes[self._index]:
            self._index, self._inside = self._index + 1, 0


def encode(state: Mapping[str, torch.Tensor]) -> bytes:
    """Return the safetensors file of a state; tensors that share memory are written separately."""
    return b"".join(SafetensorsPieces(state))


def decode(data: bytes) -> dict[str, torch.Tensor]:
    """Return the tensors of a keyframe, in memory of their own.

    Raises:
        Corrupt: not a safetensors file.
    """
    try:
        return st.load(data)
    except (SafetensorError, KeyError, ValueError) as error:
        raise Corrupt("keyframe", "safetensors", str(error)) from error


def _parse_head(text: bytes) -> tuple[tuple[TensorHead, ...], list[int]]:
    """Return the tensors in file order and their sizes in bytes.

    Raises:
        Corrupt: not a header, unknown dtypes, tensors that overlap or leave a gap.
    """
    try:
        head = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise Corrupt("keyframe header", "JSON", str(error)[:200]) from error
    if not isinstance(head, dict):
        raise Corrupt("keyframe header", "a JSON object", type(head).__name__)
    spans: list[tuple[int, int, TensorHead]] = []
    for name, entry in cast("dict[str, Any]", head).items():
        if name != _METADATA:
            spans.append(_parse_tensor(name, entry))
    spans.sort(key=lambda span: span[:2])
    end = 0
    for start, stop, (name, _, _) in spans:
        if start != end:
            raise Corrupt(f"keyframe tensor {name}", f"bytes from {end} on", f"from {start} on")
        end = stop
    return tuple(tensor for _, _, tensor in spans), [stop - start for start, stop, _ in spans]


def _parse_tensor(name: str, entry: object) -> tuple[int, int, TensorHead]:
    what = f"keyframe tensor {name}"
    if not isinstance(entry, dict) or set(cast("dict[str, Any]", entry)) != _FIELDS:
        raise Corrupt(what, "dtype, shape and data_offsets", str(cast(object, entry))[:200])
    fields = cast("dict[str, Any]", entry)
    code, shape, offsets = (
        fields["dtype"],
        _counts(fields["shape"]),
        _counts(fields["data_offsets"]),
    )
    if shape is None or len(shape) > _MAX_DIMENSIONS or offsets is None or len(offsets) != 2:
        raise Corrupt(what, "a shape and two offsets", str(fields)[:200])
    try:
        width = dtype_of(code).itemsize
    except (ValueError, TypeError) as error:
        raise Corrupt(what, "a published dtype", str(code)[:200]) from error
    num_bytes = width
    for size in shape:
        num_bytes *= size
    if offsets[1] - offsets[0] != num_bytes:
        raise Corrupt(what, f"{num_bytes} bytes for {code} {shape}", f"bytes {offsets}")
    return offsets[0], offsets[1], (name, code, shape)


def _counts(value: object) -> tuple[int, ...] | None:
    """Return a JSON list of sizes; None when it is anything else."""
    if not isinstance(value, list):
        return None
    items = cast("list[object]", value)
    # `type`: true is an int to isinstance.
    if not all(type(item) is int and 0 <= item < 1 << 63 for item in items):
        return None
    return tuple(cast("list[int]", items))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found
