"""Named tensors as safetensors files, complete or absent."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write the file beside `path`, flush it to the disk, then rename it."""
    temporary = path.with_name(f".{path.name}.partial")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a file that `write_tensors` wrote.

    Raises:
        ValueError: missing or unreadable.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
