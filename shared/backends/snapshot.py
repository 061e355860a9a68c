"""Tensors copied at one moment into memory of their own, to be written while training goes on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from shared.backends.hf_files import write_tensors


@dataclass(frozen=True)
class TensorSnapshot:
    """Named tensors on the host by stem of their file; nothing on a rank that does not write."""

    tensors: Mapping[str, Mapping[str, torch.Tensor]]

    def write(self, folder: Path) -> None:
        """Write `<stem>.safetensors` (several files and an index above 4 GiB), flushed.

        Raises:
            OSError: the disk is full or not writable.
        """
        if self.tensors:
            folder.mkdir(parents=True, exist_ok=True)
        for stem, tensors in self.tensors.items():
            write_tensors(folder, tensors.items(), stem=stem, owned=True)


def take(
    streams: Mapping[str, Iterable[tuple[str, torch.Tensor]]], *, keeps: bool = True
) -> TensorSnapshot:
    """Copy streams to the host; every rank runs each to its end, those that write keep it."""
    kept: dict[str, dict[str, torch.Tensor]] = {}
    for stem, tensors in streams.items():
        copied = {name: _own(tensor) for name, tensor in tensors if keeps}
        if keeps:
            kept[stem] = copied
    return TensorSnapshot(kept)


def _own(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
