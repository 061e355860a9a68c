"""The base of every message and the array that travels inside messages."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, model_validator

DType = Literal["u1", "u2", "i4", "i8", "u8", "f4", "f8"]
"""Little-endian numpy codes of the array types that may travel."""


MAX_DIMENSIONS = 8
MAX_LENGTH = 2**40
"""An empty array may claim any shape; beyond these numpy could not give it back."""


class Part(BaseModel):
    """A frozen, strict piece of a message."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Message(Part):
    """A payload with a type name of its own on the wire.

    Subclasses' docstrings begin "Producer -> Consumer: why", then idempotence and ordering.
    """

    subject: ClassVar[str]
    """Template of the subject below `lagwise.<run>.`, for `docs/wire.md`."""


class Array(Part):
    """An n-dimensional array as `{dtype, shape, data}`: raw little-endian C-order bytes."""

    dtype: DType
    shape: tuple[int, ...]
    data: bytes

    @model_validator(mode="after")
    def _size_matches(self) -> Self:
        if len(self.shape) > MAX_DIMENSIONS or not all(0 <= n < MAX_LENGTH for n in self.shape):
            raise ValueError("negative, too large or too many dimensions")
        expected = math.prod(self.shape) * int(self.dtype[1])
        if len(self.data) != expected:
            raise ValueError(f"{len(self.data)} bytes for {self.dtype}{list(self.shape)}")
        return self

    @classmethod
    def of(cls, values: npt.ArrayLike, dtype: DType) -> Array:
        """Copy `values` into a wire array of `dtype`."""
        array = np.ascontiguousarray(values, dtype=np.dtype("<" + dtype))
        return cls(dtype=dtype, shape=tuple(array.shape), data=array.tobytes())

    def numpy(self) -> npt.NDArray[Any]:
        """Return a read-only view of the data, shaped."""
        return np.frombuffer(self.data, dtype=np.dtype("<" + self.dtype)).reshape(self.shape)
