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

_SAMPLE_LINES = 8
"""Cache lines that are looked at to guess whether a block is dense: collecting its changes until
there are too many would take as long as the rest."""


class CompiledKernels:
    """`Kernels` in machine code. Thread-safe: scratch memory belongs to the calling thread."""

    def __init__(self) -> None:
        self._scratch = _Scratch()

    def encode(self, old: Bits, new: Bits, offset: int) -> Coded | None:
        """See `Kernels.encode`."""
        old, new = _readable(old), _readable(new)
        length = len(old)
        limit = length // DENSE_SHARE
        stride = max(1, old.nbytes // _LINE_BYTES // _SAMPLE_LINES)
        sampled, of = loops.num_differing(old, new, stride)
        if sampled * DENSE_SHARE > of:
            count, _ = loops.num_differing(old, new, 1)
            if count > limit:
                return self._encode_dense(old, new, offset, count)
        scratch = self._scratch.for_changes(old.itemsize, length)
        positions, steps, digits = scratch.positions, scratch.steps, scratch.digits
        count, num_digits, gain = loops.collect(
            old, new, offset, limit, positions, steps, digits, scratch.lines, scratch.masks
        )
        if not count:
            return None
        if count > limit:
            count, _ = loops.num_differing(old, new, 1)
            return self._encode_dense(old, new, offset, count)
        steps = steps[:count]
        union = loops.unsign(steps, scratch.negative)
        signs = np.packbits(scratch.negative[:count], bitorder="little")
        rest = [signs, *_planes(steps, union)]
        if count * WIDE_GAP >= length:
            return Coded("sparse8", count, [digits[:num_digits].copy(), *rest], gain)
        wide = np.empty(count + length // 65535, np.uint16)
        wide = wide[: loops.wide_digits(positions[:count], wide)]
        gaps = [(wide & 255).astype(np.uint8), (wide >> 8).astype(np.uint8)]
        return Coded("sparse16", count, [*gaps, *rest], gain)

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
        loops.scatter(state, positions, steps, before, after)
        return loops.gain(positions, before, after, offset)

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

    def _encode_dense(self, old: Bits, new: Bits, offset: int, count: int) -> Coded:
        values = self._scratch.get("steps", len(old), old.dtype)
        union = loops.zigzag(old, new, values)
        change = loops.digest(new, offset) - loops.digest(old, offset)
        return Coded("dense", count, _planes(values, union), change & MASK)

    def _positions(self, coded: Coded, length: int) -> npt.NDArray[np.uint32]:
        """Return positions u4[K + SCATTER_AHEAD]; what follows the K repeats the last one."""
        digits = coded.streams[0]
        if coded.form == "sparse16":
            digits = digits | coded.streams[1].astype(np.uint16) << 8
        size = len(digits) + loops.SCATTER_AHEAD + 1
        positions = self._scratch.get("positions", size, np.uint32)
        count, last = loops.places(_readable(digits), positions)
        if count != coded.count or digits[-1] == np.iinfo(digits.dtype).max:
            raise Corrupt("block", f"{coded.count} gaps", f"{count}")
        if last >= length:
            raise Corrupt("block", f"positions below {length}", str(last))
        positions[count : count + loops.SCATTER_AHEAD] = last
        return positions

    def _sparse_steps(self, coded: Coded, width: int, *, reverse: bool) -> Bits:
        steps = self._joined(coded.streams[-width:], coded.count, width)
        signs = coded.streams[-width - 1]
        negative = np.unpackbits(signs, count=coded.count, bitorder="little")
        loops.signed(steps, negative, reverse)
        return steps

    def _dense_steps(self, coded: Coded, length: int, width: int) -> Bits:
        steps = self._joined(coded.streams, length, width)
        count = loops.unzigzag(steps)
        if count != coded.count:
            raise Corrupt("block", f"{coded.count} changes", f"{count}")
        return steps

    def _joined(self, planes: list[Bytes], count: int, width: int) -> Bits:
        values = self._scratch.get("steps", count, np.dtype(f"<u{width}"))
        loops.join(tuple(_readable(plane) for plane in planes), values)
        return values


class _Changes:
    """Room for what is found in one block of W-byte elements."""

    def __init__(self, width: int, length: int) -> None:
        room = length // DENSE_SHARE + loops.STRIP_LINES * (_LINE_BYTES // width) + 2
        self.length = length
        self.positions = np.empty(room, np.uint32)
        self.steps = np.empty(room, f"<u{width}")
        self.negative = np.empty(room, np.uint8)
        self.digits = np.empty(room + length // 255, np.uint8)
        self.lines = np.empty(loops.STRIP_LINES + 1, np.int64)
        self.masks = np.empty(loops.STRIP_LINES + 1, np.uint64)


class _Scratch(threading.local):
    """Arrays that are used again, per thread: fresh memory costs a fault per page."""

    def __init__(self) -> None:
        self._changes: dict[int, _Changes] = {}
        self._held: dict[str, Bytes] = {}

    def for_changes(self, width: int, length: int) -> _Changes:
        """Return room for the changes of a block of `length` elements."""
        held = self._changes.get(width)
        if held is None or held.length < length:
            held = self._changes[width] = _Changes(width, length)
        return held

    def get(self, name: str, size: int, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Return an array [size] of anything."""
        num_bytes = size * np.dtype(dtype).itemsize
        held = self._held.get(name)
        if held is None or len(held) < num_bytes:
            held = self._held[name] = np.empty(num_bytes, np.uint8)
        return held[:num_bytes].view(dtype)


def _planes(values: Bits, union: int) -> list[Bytes]:
    """Cut values [K] into byte planes; those without a bit in `union` are empty."""
    planes: list[Bytes] = []
    for plane in range(values.itemsize):
        size = len(values) if int(union) >> 8 * plane & 255 else 0
        planes.append(np.empty(size, np.uint8))
        if size:
            loops.cut(values, plane, planes[-1])
    return planes


def _readable(bits: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return bits as the one kind of array that the loops are compiled for: aligned, read-only."""
    if not (bits.flags.c_contiguous and bits.flags.aligned):
        bits = bits.copy()
    elif not bits.flags.writeable:
        return bits
    view = bits.view()
    view.flags.writeable = False
    return view
