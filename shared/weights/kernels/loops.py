"""The loops of the compiled kernels, and the instructions that numba has no name for.

Everything is specialised, when it is first called, by the width of the elements that are passed.
All of it is one file because numba's cache of machine code looks at a function's own file only.

Shapes: N elements of one block, K of them changed, W bytes per element, L = 64 / W elements per
cache line.
"""

# The type checker sees neither what numba's decorators make nor what llvmlite builds.
# pyright: basic

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from shared.weights.kernels.reference import INDEX_KEY, MASK, MIX_1, MIX_2

STRIP_LINES = 64
"""Cache lines of each state that are compared before their changes are looked at: they are still in
the first-level cache then, and fetching the next ones overlaps with that work."""

SCAN_AHEAD = 32
"""Cache lines of each state that are fetched ahead."""

SCATTER_AHEAD = 128
"""Changes whose cache lines are fetched ahead."""

_KEY, _MIX_1, _MIX_2 = np.uint64(INDEX_KEY), np.uint64(MIX_1), np.uint64(MIX_2)
_0, _1, _29, _32 = np.uint64(0), np.uint64(1), np.uint64(29), np.uint64(32)
_HASH_LANES = 64
_HASH_KEYS = np.uint64(_HASH_LANES * INDEX_KEY & MASK)
_TOP_BIT = np.uint64(1 << 63)

_I32, _I64 = ir.IntType(32), ir.IntType(64)


def _compile(function: Any) -> Any:
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # no place to keep the machine code that this process may write to
        return numba.njit(nogil=True)(function)


def _instruction(build: Any) -> Any:
    return intrinsic(build)


def _inline(function: Any) -> Any:
    return numba.njit(nogil=True, inline="always")(function)


def _pointer(context, builder, array_type, array, index):
    data = context.make_array(array_type)(context, builder, array).data
    return builder.gep(data, [index])


@_instruction
def _width(typingctx, array):
    """W of an array, known when compiling."""
    return types.int64(array), lambda context, builder, signature, args: ir.Constant(
        _I64, signature.args[0].dtype.bitwidth // 8
    )


@_instruction
def _prefetch(typingctx, array, index):
    """Ask for the cache line of an element; an index outside the array is harmless."""

    def emit(context, builder, signature, args):
        pointer = builder.bitcast(
            _pointer(context, builder, signature.args[0], *args), ir.IntType(8).as_pointer()
        )
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, _I32, _I32, _I32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [pointer, *(ir.Constant(_I32, n) for n in (0, 3, 1))])
        return context.get_dummy_value()

    return types.void(array, types.int64), emit


@_instruction
def _differing(typingctx, old, new, index):
    """Return which of the L elements from `index` on differ: bit i is element index + i."""

    def emit(context, builder, signature, args):
        bits = signature.args[0].dtype.bitwidth
        line = ir.VectorType(ir.IntType(bits), 512 // bits).as_pointer()
        sides = (
            builder.load(
                builder.bitcast(_pointer(context, builder, kind, array, args[2]), line), align=1
            )
            for kind, array in zip(signature.args[:2], args[:2], strict=True)
        )
        mask = builder.bitcast(builder.icmp_unsigned("!=", *sides), ir.IntType(512 // bits))
        return mask if bits == 8 else builder.zext(mask, _I64)

    return types.uint64(old, new, types.int64), emit


@_instruction
def _lowest(typingctx, mask):
    """Return the index of the lowest set bit."""
    return types.int64(types.uint64), lambda context, builder, signature, args: builder.cttz(
        args[0], ir.Constant(ir.IntType(1), 1)
    )


@_instruction
def _num_set(typingctx, mask):
    """Return the number of set bits."""
    return types.int64(types.uint64), lambda context, builder, signature, args: builder.ctpop(
        args[0]
    )


@_instruction
def _hash_run(typingctx, bits, index, key):
    """Return the sum of the hashes of _HASH_LANES elements; `key` is that of the first."""

    def emit(context, builder, signature, args):
        width = signature.args[0].dtype.bitwidth
        wide = ir.VectorType(_I64, _HASH_LANES)

        def every(value):
            return ir.Constant(wide, [ir.Constant(_I64, int(value))] * _HASH_LANES)

        pointer = _pointer(context, builder, signature.args[0], *args[:2])
        narrow = ir.VectorType(ir.IntType(width), _HASH_LANES)
        elements = builder.load(builder.bitcast(pointer, narrow.as_pointer()), align=1)
        if width < 64:
            elements = builder.zext(elements, wide)
        nothing = ir.Constant(wide, ir.Undefined)
        first = builder.insert_element(nothing, args[2], ir.Constant(_I32, 0))
        zeros = ir.Constant(ir.VectorType(_I32, _HASH_LANES), None)
        keys = ir.Constant(
            wide, [ir.Constant(_I64, i * INDEX_KEY & MASK) for i in range(_HASH_LANES)]
        )
        mixed = builder.add(builder.shuffle_vector(first, nothing, zeros), keys)
        mixed = builder.xor(mixed, builder.lshr(mixed, every(29)))
        mixed = builder.mul(builder.add(mixed, elements), every(MIX_1))
        mixed = builder.xor(mixed, builder.lshr(mixed, every(32)))
        mixed = builder.mul(mixed, every(MIX_2))
        mixed = builder.xor(mixed, builder.lshr(mixed, every(29)))
        name = f"llvm.vector.reduce.add.v{_HASH_LANES}i64"
        kind = ir.FunctionType(_I64, [wide])
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [mixed])

    return types.uint64(bits, types.int64, types.uint64), emit


@_inline
def _hashed(key, bits):
    mixed = (key ^ (key >> _29)) + np.uint64(bits)
    mixed *= _MIX_1
    mixed ^= mixed >> _32
    mixed *= _MIX_2
    return mixed ^ (mixed >> _29)


@_compile
def digest(bits, offset):
    """Return the digest of bits[N], the first at flat index `offset`."""
    total = _0
    key = (np.uint64(offset) + _1) * _KEY
    whole = len(bits) // _HASH_LANES * _HASH_LANES
    for i in range(0, whole, _HASH_LANES):
        total += _hash_run(bits, i, key)
        key += _HASH_KEYS
    for i in range(whole, len(bits)):
        total += _hashed(key, bits[i])
        key += _KEY
    return total


@_compile
def num_differing(old, new, stride):
    """Return how many elements of each `stride`-th cache line differ, and how many were compared.

    With a stride of 1 the rest that fills no line is compared, too.
    """
    lanes = 64 // _width(old)
    whole = len(old) // lanes * lanes
    count, compared = 0, 0
    for i in range(0, whole, stride * lanes):
        count += _num_set(_differing(old, new, i))
        compared += lanes
    if stride == 1:
        for i in range(whole, len(old)):
            count += old[i] != new[i]
        compared = len(old)
    return count, compared


@_compile
def collect(old, new, offset, limit, positions, steps, digits, lines, masks):
    """Find where old[N] and new[N] differ, the first at flat index `offset`.

    Outputs, with room for `limit` changes, a strip and two: positions u4, ascending; steps of W
    bytes; digits u1, the one-byte gap digits, with room for N / 255 more. Scratch: lines i8 and
    masks u8, STRIP_LINES + 1 each.

    Returns (K, number of digits, what the digest gains). When K > limit there are even more
    changes, and nothing else means anything.
    """
    lanes = 64 // _width(old)
    whole = len(old) // lanes * lanes
    strip = STRIP_LINES * lanes
    count, num_digits, previous, gained = 0, 0, -1, _0
    for start in range(0, len(old), strip):
        num_lines = 0
        for i in range(start, min(start + strip, whole), lanes):
            _prefetch(old, i + SCAN_AHEAD * lanes)
            _prefetch(new, i + SCAN_AHEAD * lanes)
            mask = _differing(old, new, i)
            lines[num_lines] = i
            masks[num_lines] = mask
            num_lines += mask != _0
        first = count
        ahead = start + strip + SCAN_AHEAD * lanes
        for line in range(num_lines):
            _prefetch(old, ahead)
            _prefetch(new, ahead)
            ahead += lanes
            i, mask = lines[line], masks[line]
            here = _num_set(mask)
            # Two without a branch: mostly there are no more.
            positions[count] = i + _lowest(mask)
            mask &= mask - _1
            positions[count + 1] = i + _lowest(mask | _TOP_BIT)
            mask &= mask - _1
            if here > 2:
                further = count + 2
                while mask != _0:
                    positions[further] = i + _lowest(mask)
                    mask &= mask - _1
                    further += 1
            count += here
        if start + strip > whole:
            for i in range(max(start, whole), len(old)):
                positions[count] = i
                count += old[i] != new[i]
        for k in range(first, count):
            position = positions[k]
            before, after = np.uint64(old[position]), np.uint64(new[position])
            steps[k] = after - before
            key = (np.uint64(offset) + np.uint64(position) + _1) * _KEY
            gained += _hashed(key, after) - _hashed(key, before)
            gap = np.int64(position) - previous - 1
            previous = np.int64(position)
            while gap >= 255:
                digits[num_digits] = 255
                num_digits += 1
                gap -= 255
            digits[num_digits] = gap
            num_digits += 1
        if count > limit:
            break
    return count, num_digits, gained


@_compile
def wide_digits(positions, digits):
    """Write the two-byte gap digits u2 of positions[K]; return how many."""
    num_digits, previous = 0, -1
    for k in range(len(positions)):
        gap = np.int64(positions[k]) - previous - 1
        previous = np.int64(positions[k])
        while gap >= 65535:
            digits[num_digits] = 65535
            num_digits += 1
            gap -= 65535
        digits[num_digits] = gap
        num_digits += 1
    return num_digits


@_compile
def unsign(steps, negative):
    """Turn steps [K] into magnitudes less one, in place, and write their signs u1[K].

    Returns the union of the magnitudes' bits.
    """
    sign_shift = np.uint64(8 * _width(steps) - 1)
    union = _0
    for k in range(len(steps)):
        step = np.uint64(steps[k])
        sign = step >> sign_shift
        negative[k] = sign
        magnitude = ((step ^ (_0 - sign)) + sign) - _1
        steps[k] = magnitude
        union |= np.uint64(steps[k])
    return union


@_compile
def zigzag(old, new, values):
    """Write the steps from old[N] to new[N] in zigzag; return the union of their bits."""
    sign_shift = np.uint64(8 * _width(old) - 1)
    union = _0
    for i in range(len(old)):
        step = np.uint64(new[i]) - np.uint64(old[i])
        values[i] = (step << _1) ^ (_0 - ((step >> sign_shift) & _1))
        union |= np.uint64(values[i])
    return union


@_compile
def cut(values, plane, out):
    """Write a byte plane of values [K]."""
    for k in range(len(values)):
        out[k] = np.uint64(values[k]) >> np.uint64(8 * plane)


@_compile
def places(digits, positions):
    """Write the positions that gap digits mean; return (K, the last one), which are unchecked.

    `positions` is u4[number of digits + 1]; those beyond 2^32 wrap around, but not the last one.
    """
    highest = (1 << (8 * _width(digits))) - 1
    count, position = 0, -1
    for k in range(len(digits)):
        digit = np.int64(digits[k])
        is_end = np.int64(digit != highest)
        position += digit + is_end
        positions[count] = position
        count += is_end
    return count, position


@_compile
def join(planes, values):
    """Write the values [K] of W bytes that a tuple of byte planes [K] means; empty: all zero."""
    for k in range(len(values)):
        values[k] = 0
    for plane in range(_width(values)):
        part = planes[plane]
        if len(part):
            for k in range(len(values)):
                values[k] |= np.uint64(part[k]) << np.uint64(8 * plane)


@_compile
def signed(values, negative, reverse):
    """Turn magnitudes less one into steps, or into the steps back, in place."""
    for k in range(len(values)):
        sign = np.uint64(negative[k])
        back = sign ^ np.uint64(reverse)
        values[k] = ((np.uint64(values[k]) + _1) ^ (_0 - back)) + back


@_compile
def gain(positions, before, after, offset):
    """Return what the digest gains when elements [K] go from `before` to `after`."""
    total = _0
    for k in range(len(before)):
        key = (np.uint64(offset) + np.uint64(positions[k]) + _1) * _KEY
        total += _hashed(key, after[k]) - _hashed(key, before[k])
    return total


@_compile
def scatter(state, positions, steps, before, after):
    """Add steps[K] to the state at positions[K + SCATTER_AHEAD]; note elements before and after."""
    for k in range(len(steps)):
        _prefetch(state, np.int64(positions[k + SCATTER_AHEAD]))
        position = positions[k]
        old = state[position]
        new = np.uint64(old) + np.uint64(steps[k])
        before[k] = old
        after[k] = new
        state[position] = new


@_compile
def unzigzag(values):
    """Turn zigzag into steps, in place; return how many are not zero."""
    count = 0
    for i in range(len(values)):
        zigzag = np.uint64(values[i])
        count += zigzag != _0
        values[i] = (zigzag >> _1) ^ (_0 - (zigzag & _1))
    return count


@_compile
def add(state, steps, reverse):
    """Add steps[N] to state[N], or subtract them, in place."""
    for i in range(len(state)):
        step = np.uint64(steps[i])
        state[i] = np.uint64(state[i]) + (_0 - step if reverse else step)
