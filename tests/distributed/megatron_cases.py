"""What a rank of the megatron backend does in `test_megatron.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from models import BETAS, EPS, TEMPERATURE, packs
from torch_cases import train, write

from shared.backends.adamw import AdamWSettings
from shared.backends.megatron.backend import MegatronBackend
from shared.backends.megatron.layout import Layout


def open_backend(arguments: dict[str, Any], path: str) -> MegatronBackend:
    backend = MegatronBackend(
        getattr(torch, arguments.get("dtype", "float32")),
        layout=Layout(**arguments["layout"]),
        optimizer=AdamWSettings(betas=BETAS, eps=EPS),
        recompute=arguments.get("recompute", False),
    )
    backend.load_hf(Path(path))
    return backend


def parameters_after_steps(arguments: dict[str, Any]) -> None:
    out = arguments["out"]
    for number, (path, seed) in enumerate(arguments["runs"]):
        backend = open_backend(arguments, path)
        batch = packs(seed, 0, [[0, 1, 2, 3]])[0]
        del batch.per_token["loss_mask"]
        scores = backend.score(batch, temperature=TEMPERATURE)
        write(out, f"scores{number}.safetensors", {"scores": scores})
        backend.export_hf(Path(out) / f"export{number}")
        train(backend, seed)
        after = dict(backend.state())
        write(out, f"after{number}.safetensors", after)
        oracle = open_backend(arguments, path)
        oracle.load_state(after)
        theirs = oracle.score(batch, temperature=TEMPERATURE)
        ours = backend.score(batch, temperature=TEMPERATURE)
        write(out, f"oracle{number}.safetensors", {"oracle": theirs, "learner": ours})


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


def refusal(arguments: dict[str, Any]) -> None:
    """Write why a model is refused; the process goes on."""
    try:
        open_backend(arguments, arguments["runs"][0][0])
    except ValueError as error:
        (Path(arguments["out"]) / "refusal.txt").write_text(str(error))
