"""What a rank of the megatron backend does in `test_megatron.py`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import both_cases
import torch
from both_cases import train, write
from models import BETAS, EPS, TEMPERATURE, packs

from shared.backends.adamw import AdamWSettings
from shared.backends.megatron.backend import MegatronBackend
from shared.backends.megatron.layout import Layout


def open_backend(arguments: dict[str, Any], path: str, *, trains: bool = True) -> MegatronBackend:
    backend = MegatronBackend(
        getattr(torch, arguments.get("dtype", "float32")),
        layout=Layout(**arguments["layout"]),
        optimizer=AdamWSettings(betas=BETAS, eps=EPS),
        recompute=arguments.get("recompute", False),
        trains=trains,
    )
    backend.load_hf(Path(path))
    return backend


def parameters_after_steps(arguments: dict[str, Any]) -> None:
    out = arguments["out"]
    routed = arguments.get("routed", 0)
    for number, (path, seed) in enumerate(arguments["runs"]):
        backend = open_backend(arguments, path)
        batch = packs(seed, 0, [[0, 1, 2, 3]], routed=routed)[0]
        del batch.per_token["loss_mask"]
        scores = backend.score(batch, temperature=TEMPERATURE)
        write(out, f"scores{number}.safetensors", {"scores": scores})
        backend.export_hf(Path(out) / f"export{number}")
        train(backend, seed, routed=routed)
        after = dict(backend.state())
        write(out, f"after{number}.safetensors", after)
        oracle = open_backend(arguments, path, trains=False)
        oracle.load_state(after)
        theirs = oracle.score(batch, temperature=TEMPERATURE)
        ours = backend.score(batch, temperature=TEMPERATURE)
        write(out, f"oracle{number}.safetensors", {"oracle": theirs, "learner": ours})


save_and_load = partial(both_cases.save_and_load, open_backend)
continue_from = partial(both_cases.continue_from, open_backend)


def routing_refusal(arguments: dict[str, Any]) -> None:
    """Write why rows of more layers than the model has are refused; then score sound ones."""
    layers = arguments["routed"]
    backend = open_backend(arguments, arguments["runs"][0][0])
    try:
        backend.score(packs(0, 0, [[0, 1]], routed=layers + 1)[0], temperature=TEMPERATURE)
    except ValueError as error:
        (Path(arguments["out"]) / "refusal.txt").write_text(str(error))
    backend.score(packs(0, 0, [[0, 1]], routed=layers)[0], temperature=TEMPERATURE)


def refusal(arguments: dict[str, Any]) -> None:
    """Write why a model is refused; the process goes on."""
    try:
        open_backend(arguments, arguments["runs"][0][0])
    except ValueError as error:
        (Path(arguments["out"]) / "refusal.txt").write_text(str(error))
