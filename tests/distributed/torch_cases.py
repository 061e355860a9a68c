"""What a rank of the torch backend does in `test_fsdp.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from models import BETAS, EPS, LR, MAX_NORM, STEPS, TEMPERATURE, Loss, packs, step_sequences
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh

from shared.algo.batching import share
from shared.backends.adamw import AdamWSettings
from shared.backends.layer_options import LayerOptions
from shared.backends.torch_backend import TorchBackend


def open_backend(arguments: dict[str, Any], path: str) -> TorchBackend:
    size = dist.get_world_size()
    backend = TorchBackend(
        getattr(torch, arguments.get("dtype", "float32")),
        optimizer=AdamWSettings(betas=BETAS, eps=EPS),
        options=LayerOptions(recompute=arguments.get("recompute", False)),
        mesh=init_device_mesh("cpu", (size,)),
    )
    backend.load_hf(Path(path))
    return backend


def micro_batches(backend: Any, seed: int, step: int, max_tokens: int = 64) -> list[Any]:
    lengths = [len(ids) for ids in step_sequences(seed, step)[0]]
    shares = share(lengths, max_tokens, backend.data_ranks)
    return packs(seed, step, shares[backend.data_rank])


def train(backend: Any, seed: int, steps: range = range(STEPS), max_tokens: int = 64) -> None:
    for step in steps:
        backend.accumulate(
            micro_batches(backend, seed, step, max_tokens),
            Loss(seed, step),
            temperature=TEMPERATURE,
            with_entropy=True,
        )
        backend.step(LR, max_grad_norm=MAX_NORM)


def write(out: str, name: str, tensors: dict[str, torch.Tensor]) -> None:
    if dist.get_rank() == 0:
        save_file({k: v.detach().cpu().clone() for k, v in tensors.items()}, Path(out) / name)


def parameters_after_steps(arguments: dict[str, Any]) -> None:
    """Train each model; write its tensors, its scores, and an export of the untrained one."""
    out = arguments["out"]
    for number, (path, seed) in enumerate(arguments["runs"]):
        backend = open_backend(arguments, path)
        batch = packs(seed, 0, [[0, 1, 2, 3]])[0]
        scores = backend.score(batch, temperature=TEMPERATURE)
        write(out, f"scores{number}.safetensors", {"scores": scores})
        backend.export_hf(Path(out) / f"export{number}")
        train(backend, seed, max_tokens=arguments.get("max_tokens", 64))
        write(out, f"after{number}.safetensors", dict(backend.state()))


def save_and_load(arguments: dict[str, Any]) -> None:
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


def continue_from(arguments: dict[str, Any]) -> None:
    """A third step from a checkpoint of another layout."""
    out, (path, seed) = arguments["out"], arguments["runs"][0]
    backend = open_backend(arguments, path)
    backend.load(Path(arguments["checkpoint"]))
    train(backend, seed, range(2, 3))
    write(out, "resumed.safetensors", dict(backend.state()))
