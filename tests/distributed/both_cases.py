"""What a rank does with either backend: train, write what the test reads, save and resume."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from models import LR, MAX_NORM, STEPS, TEMPERATURE, Loss, packs, step_sequences
from safetensors.torch import save_file

from shared.algo.batching import share

Open = Callable[[dict[str, Any], str], Any]
"""Opens a backend as the arguments say, with the model at a path."""


def micro_batches(
    backend: Any, seed: int, step: int, max_tokens: int = 64, routed: int = 0
) -> list[Any]:
    lengths = [len(ids) for ids in step_sequences(seed, step)[0]]
    shares = share(lengths, max_tokens, backend.data_ranks)
    return packs(seed, step, shares[backend.data_rank], routed=routed)


def train(
    backend: Any,
    seed: int,
    steps: range = range(STEPS),
    max_tokens: int = 64,
    routed: int = 0,
) -> None:
    for step in steps:
        backend.accumulate(
            micro_batches(backend, seed, step, max_tokens, routed),
            Loss(seed, step),
            temperature=TEMPERATURE,
            with_entropy=True,
        )
        backend.step(LR, max_grad_norm=MAX_NORM)


def write(out: str, name: str, tensors: dict[str, torch.Tensor]) -> None:
    if dist.get_rank() == 0:
        save_file({k: v.detach().cpu().clone() for k, v in tensors.items()}, Path(out) / name)


def save_and_load(open_backend: Open, arguments: dict[str, Any]) -> None:
    """Two steps, a checkpoint, a third step; then the third step again from the checkpoint."""
    out, (path, seed) = arguments["out"], arguments["runs"][0]
    backend = open_backend(arguments, path)
    train(backend, seed, range(2))
    backend.save(Path(out) / "checkpoint")
    dist.barrier()
    train(backend, seed, range(2, 3))
    write(out, "straight.safetensors", dict(backend.state()))
    again = open_backend(arguments, path)
    again.load(Path(out) / "checkpoint")
    train(again, seed, range(2, 3))
    write(out, "resumed.safetensors", dict(again.state()))


def continue_from(open_backend: Open, arguments: dict[str, Any]) -> None:
    """A third step from a checkpoint of another layout."""
    out, (path, seed) = arguments["out"], arguments["runs"][0]
    backend = open_backend(arguments, path)
    backend.load(Path(arguments["checkpoint"]))
    train(backend, seed, range(2, 3))
    write(out, "resumed.safetensors", dict(backend.state()))
