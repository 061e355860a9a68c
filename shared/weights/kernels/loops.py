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

STRIP_LINES = 128
"""Cache lines of each state that are compared before their changes are looked at: they are still in
the first-level cache then."""

SCAN_AHEAD = 64
"""Cache lines of each state that are fetched ahead, so that the memory never waits for the rest."""

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
        builder.call(function, [pointer, *(ir.Constant(_I32, n) for n in (0, 2, 1))])
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
def scan(old, new, offset, limit, positions, lines, masks, negative, planes, digits):
    """Code the changes of one block, one strip after the other.

    Inputs: the states old[N] and new[N], the flat index of their first element, and how many
    changes to stop at. Outputs: positions u4, negative u1 (signs of the steps), planes u1[W] (of
    their magnitudes less one), each with room for `limit` changes, a strip and two, and digits u1
    (one-byte gap digits) with room for N / 255 more. Scratch: lines i8, masks u8, STRIP_LINES + 1.

    Returns (K, number of digits, what the digest gains). When K > limit, no output means anything.
    """
    width = _width(old)
    lanes = 64 // width
    sign_shift = np.uint64(8 * width - 1)
    count, num_digits, previous, gain = 0, 0, -1, _0
    whole = len(old) // lanes * lanes
    strip = STRIP_LINES * lanes
    for start in range(0, len(old), strip):
        stop = min(start + strip, whole)
        num_lines = 0
        for i in range(start, stop, lanes):
            _prefetch(old, i + SCAN_AHEAD * lanes)
            _prefetch(new, i + SCAN_AHEAD * lanes)
            mask = _differing(old, new, i)
            lines[num_lines] = i
            masks[num_lines] = mask
            num_lines += mask != _0
        first = count
        ahead = start + strip + SCAN_AHEAD * lanes
        for line in range(num_lines):
            # Keeps the memory busy meanwhile.
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
            position = np.int64(positions[k])
            gap = position - previous - 1
            previous = position
            while gap >= 255:
                digits[num_digits] = 255
                num_digits += 1
                gap -= 255
            digits[num_digits] = gap
            num_digits += 1
        for k in range(first, count):
            position = positions[k]
            before, after = np.uint64(old[position]), np.uint64(new[position])
            step = after - before
            sign = (step >> sign_shift) & _1
            negative[k] = sign
            magnitude = ((step ^ (_0 - sign)) + sign) - _1
            for plane in range(width):
                planes[plane, k] = magnitude >> np.uint64(8 * plane)
            key = (np.uint64(offset) + np.uint64(position) + _1) * _KEY
            gain += _hashed(key, after) - _hashed(key, before)
        if count > limit:
            break
    return count, num_digits, gain


@_compile
def wide_digits(positions, digits):
    """Write the two-byte gap digits of positions[K] to digits[K + N // 65535]; return how many."""
    num_digits, previous = 0, -1
    for k in range(len(positions)):
        position = np.int64(positions[k])
        gap = position - previous - 1
        previous = position
        while gap >= 65535:
            digits[num_digits] = 65535
            num_digits += 1
            gap -= 65535
        digits[num_digits] = gap
        num_digits += 1
    return num_digits


@_compile
def places(digits, further, positions):
    """Write the positions that gap digits mean; return (K, the last one), which are unchecked.

    `positions` is u4[number of digits + 1]; those beyond 2^32 wrap around, but not the last one.
    """
    count, position = 0, -1
    for k in range(len(digits)):
        digit = np.int64(digits[k])
        is_end = np.int64(digit != further)
        position += digit + is_end
        positions[count] = position
        count += is_end
    return count, position


@_compile
def join(planes, values):
    """Write the values [K] of W bytes that a tuple of byte planes [K] means."""
    for k in range(len(values)):
        value = _0
        for plane in range(_width(values)):
            value |= np.uint64(planes[plane][k]) << np.uint64(8 * plane)
        values[k] = value


@_compile
def signed(values, negative, reverse):
    """Turn magnitudes less one into steps, or into the steps back, in place."""
    for k in range(len(values)):
        sign = np.uint64(negative[k])
        back = sign ^ np.uint64(reverse)
        values[k] = ((np.uint64(values[k]) + _1) ^ (_0 - back)) + back


@_compile
def scatter(state, positions, count, steps, offset, before, after):
    """Add steps[K] to the state at positions[K + SCATTER_AHEAD]; return what the digest gains.

    `before` and `after` are scratch [K] of W bytes.
    """
    for k in range(count):
        _prefetch(state, np.int64(positions[k + SCATTER_AHEAD]))
        position = positions[k]
        old = state[position]
        new = np.uint64(old) + np.uint64(steps[k])
        before[k] = old
        after[k] = new
        state[position] = new
    gain = _0
    for k in range(count):
        key = (np.uint64(offset) + np.uint64(positions[k]) + _1) * _KEY
        gain += _hashed(key, after[k]) - _hashed(key, before[k])
    return gain


@_compile
def cut_zigzag(old, new, planes):
    """Write the byte planes u1[W, N] of the zigzag steps; return how many are not zero."""
    count = 0
    width = _width(old)
    sign_shift = np.uint64(8 * width - 1)
    for i in range(len(old)):
        step = np.uint64(new[i]) - np.uint64(old[i])
        count += old[i] != new[i]
        zigzag = (step << _1) ^ (_0 - ((step >> sign_shift) & _1))
        for plane in range(width):
            planes[plane, i] = zigzag >> np.uint64(8 * plane)
    return count


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
