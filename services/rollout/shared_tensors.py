"""One copy of the published tensors in shared memory, in the engine's dtype.

The rollout writes what changed while the engine still samples; the engine's processes map the same
file and read it inside the pause. Nothing is copied through a socket or pickled.

Tensors lie one after the other, each at a multiple of `ALIGNMENT`; where they lie follows from
names, shapes and dtype alone, so that both sides compute it.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from shared.weights.digests import spec
from shared.wire.weights import TensorSpec

ALIGNMENT = 64

Shapes = Mapping[str, tuple[int, ...]]


class SharedTensors:
    """Tensors by published name over a mapped file.

    Args:
        path: the file.
        shapes: by published name, in the order in which they lie.
        dtype: of all of them.
        create: make the file, which must not exist, of the size needed; otherwise it must be there.

    Raises:
        OSError: the file cannot be made or mapped; with `create`, there is no room for it.
    """

    def __init__(self, path: Path, shapes: Shapes, dtype: torch.dtype, *, create: bool) -> None:
        self.path = path
        offsets, size = _placed(shapes, dtype)
        flags = os.O_RDWR | (os.O_CREAT | os.O_EXCL if create else 0)
        handle = os.open(path, flags, 0o600)
        try:
            if create:
                # Memory is claimed now: a full /dev/shm is an error here, not a SIGBUS later.
                os.posix_fallocate(handle, 0, size)
            self._map = mmap.mmap(handle, size)
        except OSError:
            if create:
                path.unlink(missing_ok=True)
            raise
        finally:
            os.close(handle)
        buffer = torch.frombuffer(self._map, dtype=torch.uint8)
        self._tensors = {
            name: buffer[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
            for (name, shape), start in zip(shapes.items(), offsets, strict=True)
        }

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """All tensors, as views of the file."""
        return self._tensors

    def write(self, state: Mapping[str, torch.Tensor], names: Iterable[str]) -> list[TensorSpec]:
        """Cast and copy the named tensors; return what they are now, digests included."""
        written: list[TensorSpec] = []
        for name in names:
            self._tensors[name].copy_(state[name].detach())
            written.append(spec(name, self._tensors[name]))
        return written

    def unlink(self) -> None:
        """Remove the file; whoever has it mapped keeps it."""
        self.path.unlink(missing_ok=True)


def _placed(shapes: Shapes, dtype: torch.dtype) -> tuple[list[int], int]:
    """Return the byte offsets of the tensors and the size of the file."""
    offsets: list[int] = []
    end = 0
    for shape in shapes.values():
        offsets.append(end)
        end += -(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
    return offsets, max(end, ALIGNMENT)
