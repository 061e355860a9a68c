"""Tensors as the unsigned integers of their bits: what is hashed, compared and patched.

Shapes: N elements of one tensor, in C order.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Bits = npt.NDArray[Any]
"""[N] of u1, u2, u4 or u8."""

_CODES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {code: dtype for dtype, code in _CODES.items()}
_SIGNED = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def code_of(dtype: torch.dtype) -> str:
    """Return the safetensors code of a dtype.

    Raises:
        ValueError: a dtype that is never published.
    """
    try:
        return _CODES[dtype]
    except KeyError:
        raise ValueError(f"dtype {dtype} cannot be published") from None


def dtype_of(code: str) -> torch.dtype:
    """Return the dtype of a safetensors code.

    Raises:
        ValueError: an unknown code.
    """
    try:
        return _DTYPES[code]
    except KeyError:
        raise ValueError(f"unknown tensor dtype {code!r}") from None


def to_bits(tensor: torch.Tensor) -> Bits:
    """Return the elements' bits [N]; a view of a contiguous CPU tensor, not to be written to."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    size = flat.element_size()
    return flat.view(_SIGNED[size]).numpy().view(bits_dtype(size))


def from_bits(bits: Bits, code: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Return the tensor over `bits` (writable, C order), sharing its memory."""
    signed = torch.from_numpy(bits.view(np.dtype(f"i{bits.itemsize}")))
    return signed.view(dtype_of(code)).reshape(shape)


def bits_dtype(element_bytes: int) -> np.dtype[Any]:
    """Return the little-endian unsigned dtype of so many bytes."""
    return np.dtype(f"<u{element_bytes}")


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return whether dtype, shape and every bit agree (NaN payloads and -0.0 included)."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return bool(np.array_equal(to_bits(a), to_bits(b)))
