"""AdamW over a model's parameters, with a float32 master copy where they are narrower."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor

from shared.backends.hf_names import Place, write


@dataclass(frozen=True)
class AdamWSettings:
    """Everything but the learning rate, which comes with each step."""

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    """Decoupled; on tensors of at least two dimensions only (not on norms and biases)."""


class MasterAdamW:
    """torch's AdamW by parameter name; narrow parameters are stepped in float32 and cast back.

    Sharded parameters (DTensor) are stepped shard by shard; norms are over all ranks. Moments and
    masters are saved whole, as named tensors: `<part>/<parameter name>`, so that they load on
    another number of ranks.
    """

    def __init__(
        self,
        parameters: Mapping[str, torch.nn.Parameter],
        settings: AdamWSettings,
        *,
        parameters_are_masters: bool = False,
    ) -> None:
        """Step `parameters`; with `parameters_are_masters` they are what others cast down."""
        self._parameters = dict(parameters)
        self._masters: dict[str, torch.Tensor] = {}
        self._wide = parameters_are_masters
        stepped: dict[str, torch.Tensor] = {}
        for name, parameter in self._parameters.items():
            if parameter.dtype in (torch.float32, torch.float64):
                stepped[name] = parameter
            else:
                stepped[name] = self._masters[name] = parameter.detach().float()
        decayed = [t for t in stepped.values() if t.ndim >= 2]
        plain = [t for t in stepped.values() if t.ndim < 2]
        groups = [
            {"params": decayed, "weight_decay": settings.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        self._stepped = stepped
        self._adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            betas=settings.betas,
            eps=settings.eps,
            fused=True,
        )

    def step(self, lr: float, *, max_grad_norm: float) -> float:
        """Clip gradients to a global norm, step, clear them; return the norm before clipping.

        A non-finite norm skips the update. Gradients are cleared either way.
        """
        parameters = list(self._parameters.values())
        grads = [p.grad for p in parameters if p.grad is not None]
        norm = _total_norm(grads) if grads else 0.0
        if grads and math.isfinite(norm):
            torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, torch.tensor(norm))
            for name, master in self._masters.items():
                grad = self._parameters[name].grad
                master.grad = None if grad is None else grad.float()
            for group in self._adamw.param_groups:
                group["lr"] = lr
            self._adamw.step()
            with torch.no_grad():
                for name, master in self._masters.items():
                    self._parameters[name].copy_(master)
                    master.grad = None
        for parameter in parameters:
            parameter.grad = None
        return norm

    def reload_masters(self) -> None:
        """Take the masters from the parameters, after these were replaced."""
        for name, master in self._masters.items():
            master.copy_(self._parameters[name].detach())

    def stream(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield moments, step counts and masters, whole; no moments before the first step.

        A collective where parameters are sharded: every rank must run it to its end.
        """
        masters = self._stepped if self._wide else self._masters
        for name, master in masters.items():
            yield f"master/{name}", _whole(master.detach())
        for name, tensor in self._stepped.items():
            for part, value in self._adamw.state.get(tensor, {}).items():
                yield f"{part}/{name}", _whole(value)

    def state(self) -> dict[str, torch.Tensor]:
        """Return what `stream` yields."""
        return dict(self.stream())

    def check_state(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Check that a saved state is of this model.

        Args:
            shapes: of the saved tensors, by name.

        Raises:
            ValueError: a name or shape that does not belong, or a missing master.
        """
        for key, shape in shapes.items():
            part, _, name = key.partition("/")
            tensor = self._stepped.get(name)
            if part not in ("master", "step", "exp_avg", "exp_avg_sq") or tensor is None:
                raise ValueError(f"optimizer state {key} belongs to no parameter of this model")
            if part != "step" and shape != tuple(tensor.shape):
                raise ValueError(
                    f"optimizer state {key} has shape {shape}, the parameter {tuple(tensor.shape)}"
                )
        for name in self._stepped if self._wide else self._masters:
            if f"master/{name}" not in shapes:
                raise ValueError(f"optimizer state lacks master/{name}")

    @torch.no_grad()
    def load_state(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Restore what `stream` yielded, tensor by tensor; call `check_state` first."""
        self._adamw.state.clear()
        for key, value in tensors:
            part, _, name = key.partition("/")
            tensor = self._stepped[name]
            if part == "master":
                write(tensor.detach(), Place(name), value)
            elif part == "step" or not isinstance(tensor, DTensor):
                self._adamw.state[tensor][part] = value.to(tensor.device, copy=True)
            else:
                moment = torch.zeros_like(tensor.detach())
                write(moment, Place(name), value)
                self._adamw.state[tensor][part] = moment


def _total_norm(grads: list[torch.Tensor]) -> float:
    norm = torch.nn.utils.get_total_norm(grads)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
