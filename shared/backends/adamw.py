"""AdamW over a model's parameters, with a float32 master copy where they are narrower."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class AdamWSettings:
    """Everything but the learning rate, which comes with each step."""

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    """Decoupled; on tensors of at least two dimensions only (not on norms and biases)."""


class MasterAdamW:
    """torch's AdamW by parameter name; narrow parameters are stepped in float32 and cast back.

    Moments and masters are saved as named tensors: `<part>/<parameter name>`.
    """

    def __init__(
        self, parameters: Mapping[str, torch.nn.Parameter], settings: AdamWSettings
    ) -> None:
        self._parameters = dict(parameters)
        self._masters: dict[str, torch.Tensor] = {}
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
        norm = float(torch.nn.utils.get_total_norm(grads)) if grads else 0.0
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

    def state(self) -> dict[str, torch.Tensor]:
        """Return moments, step counts and masters; moments are absent before the first step."""
        tensors = {f"master/{name}": master for name, master in self._masters.items()}
        for name, tensor in self._stepped.items():
            for part, value in self._adamw.state.get(tensor, {}).items():
                tensors[f"{part}/{name}"] = value
        return tensors

    def check_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Check that a saved state is of this model.

        Raises:
            ValueError: a name or shape that does not belong, or a missing master.
        """
        for key, value in tensors.items():
            part, _, name = key.partition("/")
            tensor = self._stepped.get(name)
            if part not in ("master", "step", "exp_avg", "exp_avg_sq") or tensor is None:
                raise ValueError(f"optimizer state {key} belongs to no parameter of this model")
            if part != "step" and value.shape != tensor.shape:
                raise ValueError(
                    f"optimizer state {key} has shape {tuple(value.shape)}, the parameter "
                    f"{tuple(tensor.shape)}"
                )
        for name in self._masters:
            if f"master/{name}" not in tensors:
                raise ValueError(f"optimizer state lacks master/{name}")

    def load_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Restore what `state` returned; call `check_state` first."""
        self._adamw.state.clear()
        for key, value in tensors.items():
            part, _, name = key.partition("/")
            if part == "master":
                self._masters[name].copy_(value)
            else:
                tensor = self._stepped[name]
                self._adamw.state[tensor][part] = value.to(tensor.device, copy=True)
