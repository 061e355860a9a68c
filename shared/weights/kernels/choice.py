"""Which kernels a model is worth."""

from __future__ import annotations

import functools

from shared.weights.kernels.base import Kernels
from shared.weights.kernels.reference import ReferenceKernels

COMPILED_BYTES = 32 * 1024 * 1024
"""Compiled kernels cost a process 110 MB and half a second, two more seconds where the machine code
is not cached yet; numpy does this much in less."""

_REFERENCE = ReferenceKernels()


def kernels_for(num_bytes: int) -> Kernels:
    """Return the kernels for a model of so many bytes; the results are the same bit for bit."""
    return _REFERENCE if num_bytes <= COMPILED_BYTES else compiled_kernels()


@functools.cache
def compiled_kernels() -> Kernels:
    """Return the compiled kernels; the first call loads the compiler."""
    from shared.weights.kernels.compiled import CompiledKernels

    return CompiledKernels()
