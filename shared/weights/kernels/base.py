"""What the kernels are and what they exchange.

Shapes: N elements of one block, K of them changed, W bytes per element.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from shared.weights.errors import Corrupt

Bits = npt.NDArray[Any]
"""[N] of u1, u2, u4 or u8, contiguous."""

Bytes = npt.NDArray[np.uint8]

Form = Literal["sparse8", "sparse16", "dense"]

FORMS: tuple[Form, ...] = ("sparse8", "sparse16", "dense")

DENSE_SHARE = 4
"""Dense when more than one element in so many changed. From there on a zero per unchanged element
costs less than a gap per changed one (entropies cross near 0.25)."""

WIDE_GAP = 256
"""Two-byte gaps when changes are rarer than one in so many: one-byte ones would be mostly
continuations."""


@dataclass(frozen=True)
class Coded:
    """The changes of one block.

    A gap is the number of unchanged elements before a changed one. It is written in digits of one
    or two bytes; the highest digit means "that many further, and there is more".
    """

    form: Form
    count: int
    """K."""
    streams: list[Bytes]
    """Of bytes. `sparse8`: gap digits; `sparse16`: low and high bytes of the gap digits. Then, of
    both, the signs of the steps (1: negative; bit i of byte j is change 8j + i) and the W byte
    planes, low first, of their magnitudes less one, K each. `dense`: the W byte planes of all
    steps in zigzag (0, -1, 1, -2, ...), N each. A plane of zeros is empty."""
    digest_change: int
    """What the digest of the tensor gains (u64); 0 when unknown, as after decoding."""


class Kernels(Protocol):
    """What is done to one block; implementations agree bit for bit.

    A step is `new - old` modulo 2^(8W). `offset` is the flat index of the block's first element in
    its tensor, which the digest needs. All of it releases the interpreter lock where it can.
    """

    def encode(self, old: Bits, new: Bits, offset: int) -> Coded | None:
        """Return what takes `old` to `new`, None when they are equal."""
        ...

    def apply(self, state: Bits, coded: Coded, offset: int, *, reverse: bool) -> int:
        """Take `state` forward, or back, in place; return what the tensor's digest gains (u64).

        Raises:
            Corrupt: streams that cannot belong to this block; nothing was written then.
        """
        ...

    def digest(self, bits: Bits, offset: int) -> int:
        """Return the additive digest (u64) of consecutive elements, the first at `offset`."""
        ...

    def steps(
        self, coded: Coded, length: int, width: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[Any]]:
        """Return (positions i8[K] within the block, ascending; steps u(width)[K]).

        Args:
            coded: of a block.
            length: N.
            width: W.

        Raises:
            Corrupt: streams that cannot belong to such a block.
        """
        ...


def stream_limits(form: Form, width: int, count: int, length: int) -> list[int]:
    """Return the largest size that each stream of a block may have, in order."""
    if form == "dense":
        return [length] * width
    signs = (count + 7) // 8
    if form == "sparse8":
        return [count + length // 255, signs] + [count] * width
    return [count + length // 65535] * 2 + [signs] + [count] * width


def check_streams(coded: Coded, width: int, length: int) -> None:
    """Compare the streams' sizes, and the signs' unused bits, with a block of `length` elements.

    Raises:
        Corrupt: they do not fit.
    """
    limits = stream_limits(coded.form, width, coded.count, length)
    sizes = [len(stream) for stream in coded.streams]
    num_gaps = len(limits) - width - 1 if coded.form != "dense" else 0
    fits = (
        len(sizes) == len(limits)
        and all(size == sizes[0] <= limits[0] for size in sizes[:num_gaps])
        and sizes[num_gaps:-width] == limits[num_gaps:-width]
        and all(size in (0, limits[-1]) for size in sizes[-width:])
    )
    if not fits:
        raise Corrupt("block", f"streams of {limits} bytes", f"{sizes}")
    if num_gaps and coded.count % 8 and coded.streams[num_gaps][-1] >> coded.count % 8:
        raise Corrupt("block", f"{coded.count} signs", "more")
