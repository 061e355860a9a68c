"""What a rank of the torch backend does in `test_fsdp.py`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import both_cases
import torch
import torch.distributed as dist
from both_cases import train, write
from models import BETAS, EPS, TEMPERATURE, packs
from torch.distributed.device_mesh import init_device_mesh

from shared.backends.adamw import AdamWSettings
from shared.backends.layer_options import LayerOptions
from shared.backends.torch_backend import TorchBackend


def open_backend(arguments: dict[str, Any], path: str, *, trains: bool = True) -> TorchBackend:
    size = dist.get_world_size()
    backend = TorchBackend(
        getattr(torch, arguments.get("dtype", "float32")),
        optimizer=AdamWSettings(betas=BETAS, eps=EPS),
        options=LayerOptions(recompute=arguments.get("recompute", False)),
        mesh=init_device_mesh("cpu", (size,)),
        trains=trains,
    )
    backend.load_hf(Path(path))
    return backend


def parameters_after_steps(arguments: dict[str, Any]) -> None:
    """Train each model; write its tensors, its scores, and an export of the untrained one."""
    out = arguments["out"]
    routed = arguments.get("routed", 0)
    for number, (path, seed) in enumerate(arguments["runs"]):
        backend = open_backend(arguments, path)
        batch = packs(seed, 0, [[0, 1, 2, 3]], routed=routed)[0]
        scores = backend.score(batch, temperature=TEMPERATURE)
        write(out, f"scores{number}.safetensors", {"scores": scores})
        backend.export_hf(Path(out) / f"export{number}")
        train(backend, seed, max_tokens=arguments.get("max_tokens", 64), routed=routed)
        after = dict(backend.state())
        write(out, f"after{number}.safetensors", after)
        oracle = open_backend(arguments, path, trains=False)
        oracle.load_state(after)
        scores = {
            name: side.score(batch, temperature=TEMPERATURE)
            for name, side in (("oracle", oracle), ("learner", backend))
        }
        write(out, f"oracle{number}.safetensors", scores)


save_and_load = partial(both_cases.save_and_load, open_backend)
continue_from = partial(both_cases.continue_from, open_backend)
