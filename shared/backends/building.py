"""A backend from plain settings: the same on every rank of a job, and for learner and oracle."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Literal, Protocol, cast

import torch
from torch.distributed.device_mesh import DeviceMesh

from shared.backends.adamw import AdamWSettings
from shared.backends.base import Backend
from shared.backends.layer_options import LayerOptions
from shared.backends.megatron.layout import Layout
from shared.backends.torch_backend import TorchBackend

Device = Literal["auto", "cpu", "cuda"]


class LayoutSettings(Protocol):
    """`model.layout` of the configuration."""

    @property
    def tp(self) -> int: ...
    @property
    def pp(self) -> int: ...
    @property
    def ep(self) -> int: ...
    @property
    def sp(self) -> bool: ...


class ModelSettings(Protocol):
    """What of the section `model` a backend depends on."""

    @property
    def source(self) -> str: ...
    @property
    def backend(self) -> Literal["torch", "megatron"]: ...
    @property
    def layout(self) -> LayoutSettings: ...
    @property
    def device(self) -> Device: ...
    @property
    def dtype(self) -> str: ...
    @property
    def recompute(self) -> bool: ...
    @property
    def compile(self) -> bool: ...


@dataclass(frozen=True)
class BackendSpec:
    """Which backend, and the model it is to load."""

    source: Path
    kind: Literal["torch", "megatron"] = "torch"
    dtype: torch.dtype = torch.float32
    device: Device = "auto"
    layout: Layout = field(default_factory=Layout)
    adamw: AdamWSettings | None = None
    """None: it only scores, without the memory of an optimizer."""
    recompute: bool = False
    compile: bool = False

    @classmethod
    def of(cls, model: ModelSettings, adamw: AdamWSettings | None = None) -> BackendSpec:
        """Take it from the configuration."""
        layout = model.layout
        return cls(
            source=Path(model.source),
            kind=model.backend,
            dtype=cast("torch.dtype", getattr(torch, model.dtype)),
            device=model.device,
            layout=Layout(layout.tp, layout.pp, layout.ep, layout.sp),
            adamw=adamw,
            recompute=model.recompute,
            compile=model.compile,
        )


def device_of(wanted: Device, local_rank: int = 0) -> torch.device:
    """Return where a process computes; on CUDA it becomes the calling thread's device.

    Raises:
        ValueError: CUDA is asked for and absent, or there are fewer devices than local ranks.
    """
    have = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "cpu" or (wanted == "auto" and not have):
        return torch.device("cpu")
    if not have:
        raise ValueError("model.device cuda: this machine shows no CUDA device; take auto or cpu")
    if local_rank >= have:
        raise ValueError(
            f"model.device {wanted}: local rank {local_rank} needs a device of its own and this "
            f"machine shows {have}: start fewer ranks here, or take cpu"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def build(spec: BackendSpec, device: torch.device, mesh: DeviceMesh | None = None) -> Backend:
    """Build the backend and load its model.

    Args:
        spec: what to build.
        device: this process's (`device_of`).
        mesh: of the data-parallel ranks, for the torch backend on several.

    Raises:
        ValueError: megatron-core is not installed, or the model or its layout cannot be used.
        OSError: the model directory cannot be read.
    """
    backend: Backend
    if spec.kind == "megatron":
        backend = _megatron(spec, device)
    else:
        backend = TorchBackend(
            spec.dtype,
            optimizer=spec.adamw,
            device=str(device),
            options=LayerOptions(recompute=spec.recompute, compile=spec.compile),
            mesh=mesh,
            trains=spec.adamw is not None,
        )
    backend.load_hf(spec.source)
    return backend


def _megatron(spec: BackendSpec, device: torch.device) -> Backend:
    if spec.compile:
        raise ValueError("model.compile: the backend megatron does not compile layers; set false")
    if device.type == "cpu" and torch.cuda.is_available():
        raise ValueError(
            "model.device cpu: the backend megatron uses CUDA wherever it shows; hide the devices "
            "(CUDA_VISIBLE_DEVICES=) or take auto"
        )
    # Only here: it imports megatron-core, which not every installation has.
    cls = import_module("shared.backends.megatron.backend").MegatronBackend
    backend = cls(
        spec.dtype,
        layout=spec.layout,
        optimizer=spec.adamw,
        recompute=spec.recompute,
        trains=spec.adamw is not None,
    )
    return cast("Backend", backend)
