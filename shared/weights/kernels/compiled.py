"""The kernels compiled: the same results as the reference, at the speed of the memory.

Importing this module loads the compiler; `choice.py` does so for models that are worth it.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import numpy.typing as npt

from shared.weights.errors import Corrupt
from shared.weights.kernels import loops
from shared.weights.kernels.base import (
    DENSE_SHARE,
    WIDE_GAP,
    Bits,
    Bytes,
    Coded,
    check_streams,
)
from shared.weights.kernels.reference import MASK

_LINE_BYTES = 64


class CompiledKernels:
    """`Kernels` in machine code. Thread-safe: scratch memory belongs to the calling thread."""

    def __init__(self) -> None:
        self._scratch = _Scratch()

    def encode(self, old: Bits, new: Bits, offset: int) -> Coded | None:
        """See `Kernels.encode`."""
        old, new = _readable(old), _readable(new)
        length, width = len(old), old.itemsize
        limit = length // DENSE_SHARE
        room = limit + loops.STRIP_LINES * (_LINE_BYTES // width) + 2
        positions = self._scratch.get("positions", room, np.uint32)
        negative = self._scratch.get("negative", room, np.uint8)
        planes = self._scratch.get("planes", room * width, np.uint8).reshape(width, room)
        digits = self._scratch.get("digits", room + length // 255, np.uint8)
        lines = self._scratch.get("lines", loops.STRIP_LINES + 1, np.int64)
        masks = self._scratch.get("masks", loops.STRIP_LINES + 1, np.uint64)
        count, num_digits, gain = loops.scan(
            old, new, offset, limit, positions, lines, masks, negative, planes, digits
        )
        if not count:
            return None
        if count > limit:
            return self._encode_dense(old, new, offset)
        steps = [np.packbits(negative[:count], bitorder="little")]
        steps += [plane[:count].copy() for plane in planes]
        if count * WIDE_GAP >= length:
            return Coded("sparse8", count, [digits[:num_digits].copy(), *steps], gain)
        wide = np.empty(count + length // 65535, np.uint16)
        wide = wide[: loops.wide_digits(positions[:count], wide)]
        gaps = [(wide & 255).astype(np.uint8), (wide >> 8).astype(np.uint8)]
        return Coded("sparse16", count, gaps + steps, gain)

    def apply(self, state: Bits, coded: Coded, offset: int, *, reverse: bool) -> int:
        """See `Kernels.apply`."""
        width = state.itemsize
        check_streams(coded, width, len(state))
        if coded.form == "dense":
            steps = self._dense_steps(coded, len(state), width)
            before = self.digest(state, offset)
            loops.add(state, steps, reverse)
            return (self.digest(state, offset) - before) & MASK
        positions = self._positions(coded, len(state))
        steps = self._sparse_steps(coded, width, reverse=reverse)
        before = self._scratch.get("before", coded.count, state.dtype)
        after = self._scratch.get("after", coded.count, state.dtype)
        return loops.scatter(state, positions, coded.count, steps, offset, before, after)

    def digest(self, bits: Bits, offset: int) -> int:
        """See `Kernels.digest`."""
        return loops.digest(_readable(bits), offset)

    def steps(
        self, coded: Coded, length: int, width: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[Any]]:
        """See `Kernels.steps`."""
        check_streams(coded, width, length)
        if coded.form == "dense":
            steps = self._dense_steps(coded, length, width)
            positions = np.flatnonzero(steps)
            return positions, steps[positions]
        positions = self._positions(coded, length)[: coded.count]
        steps = self._sparse_steps(coded, width, reverse=False)
        return positions.astype(np.int64), steps.copy()

    def _encode_dense(self, old: Bits, new: Bits, offset: int) -> Coded:
        planes = np.empty((old.itemsize, len(old)), np.uint8)
        count = loops.cut_zigzag(old, new, planes)
        change = loops.digest(new, offset) - loops.digest(old, offset)
        return Coded("dense", count, list(planes), change & MASK)

    def _positions(self, coded: Coded, length: int) -> npt.NDArray[np.uint32]:
        """Return positions u4[K + SCATTER_AHEAD], the last ones at 0."""
        if coded.form == "sparse8":
            digits, further = _readable(coded.streams[0]), 255
        else:
            low, high = coded.streams[:2]
            digits, further = _readable(low | high.astype(np.uint16) << 8), 65535
        positions = self._scratch.get("positions", len(digits) + loops.SCATTER_AHEAD + 1, np.uint32)
        count, last = loops.places(digits, further, positions)
        if count != coded.count or digits[-1] == further:
            raise Corrupt("block", f"{coded.count} gaps", f"{count}")
        if last >= length:
            raise Corrupt("block", f"positions below {length}", str(last))
        positions[count : count + loops.SCATTER_AHEAD] = last
        return positions

    def _sparse_steps(self, coded: Coded, width: int, *, reverse: bool) -> Bits:
        steps = self._joined(coded.streams[-width:], width)
        signs = coded.streams[-width - 1]
        negative = np.unpackbits(signs, count=coded.count, bitorder="little")
        loops.signed(steps, negative, reverse)
        return steps

    def _dense_steps(self, coded: Coded, length: int, width: int) -> Bits:
        steps = self._joined(coded.streams, width)
        count = loops.unzigzag(steps)
        if count != coded.count:
            raise Corrupt("block", f"{coded.count} changes", f"{count}")
        return steps

    def _joined(self, planes: list[Bytes], width: int) -> Bits:
        values = self._scratch.get("steps", len(planes[0]), np.dtype(f"<u{width}"))
        loops.join(tuple(_readable(plane) for plane in planes), values)
        return values


class _Scratch(threading.local):
    """Arrays that are used again, per thread: fresh memory costs a fault per page."""

    def __init__(self) -> None:
        self._held: dict[str, Bytes] = {}

    def get(self, name: str, size: int, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Return an array [size] of anything."""
        num_bytes = size * np.dtype(dtype).itemsize
        held = self._held.get(name)
        if held is None or len(held) < num_bytes:
            held = self._held[name] = np.empty(num_bytes, np.uint8)
        return held[:num_bytes].view(dtype)


def _readable(bits: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return bits as the one kind of array that the loops are compiled for: aligned, read-only."""
    if not (bits.flags.c_contiguous and bits.flags.aligned):
        bits = bits.copy()
    elif not bits.flags.writeable:
        return bits
    view = bits.view()
    view.flags.writeable = False
    return view
