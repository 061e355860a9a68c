"""From flat positions in a published tensor to those in a local one.

Shapes: N positions looked up, K of them in the box.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from shared.weights.layouts import Placement, Shape, c_strides

Positions = npt.NDArray[Any]
"""[K] of i8."""


class Lookup:
    """From flat positions in a source to those in a local tensor, for one placement."""

    def __init__(self, local: str, placement: Placement, local_shape: Shape) -> None:
        self.local = local
        self.placement = placement
        strides = c_strides(local_shape)
        self._origin = sum(a * b for a, b in zip(placement.offset, strides, strict=True))
        axes = [
            _Axis(length, start, size, step * strides[dim])
            for length, start, size, step, dim in zip(
                placement.source_shape,
                placement.start,
                placement.size,
                placement.step,
                placement.dims,
                strict=True,
            )
        ]
        self._axes = _merged(axes or [_Axis(1, 0, 1, 1)])
        lengths = c_strides(tuple(axis.length for axis in self._axes))
        self._strides = lengths
        outer = self._axes[0]
        self.first = outer.start * lengths[0]
        self.end = (outer.start + outer.size) * lengths[0] if placement.num_elements else self.first
        """All elements of the box lie in the source at [first, end)."""

    def find(self, positions: npt.NDArray[np.int64]) -> tuple[Positions | slice, Positions]:
        """Return (which of positions i8[N], ascending, lie in the box; where they lie locally)."""
        low, high = (int(i) for i in np.searchsorted(positions, (self.first, self.end)))
        rest = positions[low:high]
        local = np.full(len(rest), self._origin, np.int64)
        inside: npt.NDArray[np.bool_] | None = None
        for axis, stride in zip(self._axes, self._strides, strict=True):
            if axis is self._axes[-1]:
                index = rest
            else:
                index, rest = np.divmod(rest, stride)
            index = index - axis.start
            local += index * axis.stride
            if axis is not self._axes[0]:
                hit = (index >= 0) & (index < axis.size)
                inside = hit if inside is None else inside & hit
        if inside is None:
            return slice(low, high), local
        return low + np.flatnonzero(inside), local[inside]


class _Axis(NamedTuple):
    """One dimension of a source, or several that lie one after the other on both sides."""

    length: int
    start: int
    size: int
    stride: int
    """Local elements per step along it."""


def _merged(axes: list[_Axis]) -> list[_Axis]:
    """Join dimensions that lie one after the other on both sides; most boxes come down to one."""
    merged = [axes[-1]]
    for outer in reversed(axes[:-1]):
        inner = merged[-1]
        is_full = inner.start == 0 and inner.size == inner.length
        if is_full and (outer.size == 1 or outer.stride == inner.stride * inner.length):
            merged[-1] = _Axis(
                outer.length * inner.length,
                outer.start * inner.length,
                outer.size * inner.length,
                inner.stride,
            )
        else:
            merged.append(outer)
    return merged[::-1]
