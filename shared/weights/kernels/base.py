"""What the kernels are and what they exchange.

Shapes: N elements of one block, K of them changed, W bytes per element.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

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

    A gap is the number of unchanged elements before a changed one. It is written as one digit of
    one or two bytes; the highest digit means "that many further, and there is more".
    """

    form: Form
    count: int
    """K."""
    streams: list[Bytes]
    """`sparse8`: gap digits; `sparse16`: low and high bytes of the gap digits; then, K each, the W
    byte planes of the zigzag steps, low first. `dense`: the W planes only, N each."""
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


def num_streams(form: Form, width: int) -> int:
    """Return how many streams a form has."""
    return width + FORMS.index(form) + 1 if form != "dense" else width


def stream_limits(form: Form, width: int, count: int, length: int) -> list[int]:
    """Return the largest size each stream of a block may have; planes have exactly theirs."""
    if form == "dense":
        return [length] * width
    if form == "sparse8":
        return [count + length // 255] + [count] * width
    return [count + length // 65535] * 2 + [count] * width
