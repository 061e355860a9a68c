"""The kernels in numpy: what the compiled ones are held to, and what small models use."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from shared.weights.errors import Corrupt
from shared.weights.kernels.base import (
    DENSE_SHARE,
    WIDE_GAP,
    Bits,
    Bytes,
    Coded,
    Form,
    check_streams,
)

MASK = (1 << 64) - 1

# 2^64 / golden ratio, and the two multipliers of splitmix64 (Steele et al., OOPSLA 2014).
INDEX_KEY = 0x9E3779B97F4A7C15
MIX_1 = 0xBF58476D1CE4E5B9
MIX_2 = 0x94D049BB133111EB

_29, _32 = np.uint64(29), np.uint64(32)
_SCRATCH = 16384
"""Elements hashed at a time: both scratch rows stay in the second-level cache."""
_ORDINALS: npt.NDArray[np.uint64] = np.arange(1, _SCRATCH + 1, dtype=np.uint64)


class ReferenceKernels:
    """`Kernels` in numpy."""

    def encode(self, old: Bits, new: Bits, offset: int) -> Coded | None:
        """See `Kernels.encode`."""
        positions = np.flatnonzero(old != new)
        count, length = len(positions), len(old)
        if not count:
            return None
        before, after = old[positions], new[positions]
        change = contributions(positions + offset, after) - contributions(
            positions + offset, before
        )
        if count * DENSE_SHARE > length:
            return Coded("dense", count, _value_planes(_zigzag(new - old)), change & MASK)
        form: Form = "sparse8" if count * WIDE_GAP >= length else "sparse16"
        streams = _gap_streams(positions, form) + _step_streams(after - before)
        return Coded(form, count, streams, change & MASK)

    def apply(self, state: Bits, coded: Coded, offset: int, *, reverse: bool) -> int:
        """See `Kernels.apply`."""
        positions, steps = self.steps(coded, len(state), state.itemsize)
        before = state[positions]
        after = before - steps if reverse else before + steps
        state[positions] = after
        change = contributions(positions + offset, after) - contributions(
            positions + offset, before
        )
        return change & MASK

    def digest(self, bits: Bits, offset: int) -> int:
        """See `Kernels.digest`."""
        total = 0
        for start in range(0, len(bits), _SCRATCH):
            block = bits[start : start + _SCRATCH]
            total += _mixed_sum(_ORDINALS[: len(block)] + np.uint64(offset + start), block)
        return total & MASK

    def steps(
        self, coded: Coded, length: int, width: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[Any]]:
        """See `Kernels.steps`."""
        check_streams(coded, width, length)
        size = length if coded.form == "dense" else coded.count
        values = _joined(coded.streams[-width:], size)
        if coded.form == "dense":
            positions = np.flatnonzero(values)
            if len(positions) != coded.count:
                raise Corrupt("block", f"{coded.count} changes", f"{len(positions)}")
            return positions, _unzigzag(values[positions])
        positions = _positions(coded, length)
        return positions, _signed(values, coded.streams[-width - 1])


def contributions(positions: npt.NDArray[Any], bits: Bits) -> int:
    """Return what elements bits[K] at flat indices positions[K] add to their tensor's digest."""
    total = 0
    for start in range(0, len(bits), _SCRATCH):
        indices = positions[start : start + _SCRATCH].astype(np.uint64)
        indices += np.uint64(1)
        total += _mixed_sum(indices, bits[start : start + _SCRATCH])
    return total & MASK


def _mixed_sum(ordinals: npt.NDArray[np.uint64], bits: Bits) -> int:
    """Sum the hashes of (ordinal, bits) modulo 2^64; `ordinals` is scratch and overwritten."""
    key = ordinals
    key *= np.uint64(INDEX_KEY)
    shifted = key >> _29
    key ^= shifted
    key += bits
    key *= np.uint64(MIX_1)
    np.right_shift(key, _32, out=shifted)
    key ^= shifted
    key *= np.uint64(MIX_2)
    np.right_shift(key, _29, out=shifted)
    key ^= shifted
    return int(key.sum(dtype=np.uint64))


def _zigzag(steps: Bits) -> Bits:
    """Map 0, -1, 1, -2, ... to 0, 1, 2, 3, ...: small steps have zero high bytes."""
    signed = steps.view(np.dtype(f"i{steps.itemsize}"))
    return ((signed << 1) ^ (signed >> (8 * steps.itemsize - 1))).view(steps.dtype)


def _unzigzag(zigzag: Bits) -> Bits:
    one = zigzag.dtype.type(1)
    return (zigzag >> one) ^ (~(zigzag & one) + one)


def _step_streams(steps: Bits) -> list[Bytes]:
    negative = steps >> steps.dtype.type(8 * steps.itemsize - 1)
    magnitudes = (steps ^ (0 - negative)) + negative
    return [np.packbits(negative.astype(bool), bitorder="little"), *_value_planes(magnitudes - 1)]


def _signed(magnitudes: Bits, signs: Bytes) -> Bits:
    """Undo `_step_streams`."""
    negative = np.unpackbits(signs, count=len(magnitudes), bitorder="little")
    negative = negative.astype(magnitudes.dtype)
    return ((magnitudes + 1) ^ (0 - negative)) + negative


def _planes(values: Bits) -> list[Bytes]:
    """Cut values [K] into their bytes, low first: K each."""
    rows = np.ascontiguousarray(values).view(np.uint8).reshape(len(values), values.itemsize)
    return [np.ascontiguousarray(rows[:, i]) for i in range(values.itemsize)]


def _value_planes(values: Bits) -> list[Bytes]:
    """Cut values [K] into their bytes; planes of zeros are empty."""
    return [plane if plane.any() else plane[:0] for plane in _planes(values)]


def _joined(planes: list[Bytes], count: int) -> Bits:
    """Return the values [K] that planes mean; empty ones are zeros."""
    rows = np.zeros((count, len(planes)), np.uint8)
    for i, plane in enumerate(planes):
        if len(plane):
            rows[:, i] = plane
    return rows.reshape(-1).view(np.dtype(f"<u{len(planes)}"))


def _gap_streams(positions: npt.NDArray[np.int64], form: Form) -> list[Bytes]:
    gaps = np.diff(positions, prepend=-1) - 1
    further = 255 if form == "sparse8" else 65535
    ends = np.cumsum(gaps // further + 1) - 1
    digits = np.full(int(ends[-1]) + 1, further, np.uint8 if form == "sparse8" else np.uint16)
    digits[ends] = gaps % further
    return _planes(digits)


def _positions(coded: Coded, length: int) -> npt.NDArray[np.int64]:
    """Undo `_gap_streams`; refuses what it would not have written."""
    further = 255 if coded.form == "sparse8" else 65535
    num_gap_bytes = 1 if coded.form == "sparse8" else 2
    digits = _joined(coded.streams[:num_gap_bytes], len(coded.streams[0]))
    is_end = digits != further
    positions = (np.cumsum(digits + is_end.astype(np.int64)) - 1)[is_end]
    if len(positions) != coded.count or not is_end[-1]:
        raise Corrupt("block", f"{coded.count} gaps", f"{len(positions)}")
    if positions[-1] >= length:
        raise Corrupt("block", f"positions below {length}", str(int(positions[-1])))
    return positions
