"""megatron-core's distributed optimizer: one step, and its state as whole named tensors.

Every data-parallel rank steps a range of the flat gradient buffer. The state is saved as masters
and moments by Hugging Face name, as if they were weights, so that it loads on any other layout;
megatron-core's own checkpoints of it could not be read back without TransformerEngine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist

from shared.backends.adamw import AdamWSettings
from shared.backends.megatron import core, cpu
from shared.backends.megatron.mapping import Entry
from shared.backends.megatron.weights import ShardedWeights

MOMENTS = ("exp_avg", "exp_avg_sq")
STEP = "step"
CLIP_EPS = 1e-6
"""torch's, in the clipping factor."""


class ShardedAdamW:
    """AdamW over the ranks of a layout."""

    def __init__(
        self, model: Any, settings: AdamWSettings, weights: ShardedWeights, dtype: torch.dtype
    ) -> None:
        self._model = model
        self._weights = weights
        self._has_masters = dtype != torch.float32
        self._optimizer: Any = core.optimizers.get_megatron_optimizer(
            core.optimizers.OptimizerConfig(
                optimizer="adam",
                lr=0.0,
                min_lr=0.0,
                weight_decay=settings.weight_decay,
                adam_beta1=settings.betas[0],
                adam_beta2=settings.betas[1],
                adam_eps=settings.eps,
                clip_grad=0.0,
                bf16=dtype == torch.bfloat16,
                params_dtype=dtype,
                use_distributed_optimizer=True,
            ),
            [model],
            use_gloo_process_groups=False,
        )
        cpu.adapt()
        model.zero_grad_buffer()

    @property
    def _parts(self) -> list[Any]:
        """One optimizer for what all ranks share, one for the experts."""
        return list(getattr(self._optimizer, "chained_optimizers", [self._optimizer]))

    def step(self, lr: float, *, max_grad_norm: float) -> float:
        """Sum gradients over ranks, clip, step, clear them; return the norm before clipping.

        A non-finite norm skips the update.
        """
        core.finalizing.finalize_model_grads([self._model])
        self._optimizer.prepare_grads()
        norm = float(self._optimizer.get_grad_norm())
        if math.isfinite(norm):
            factor = max_grad_norm / (norm + CLIP_EPS)
            for group in self._optimizer.param_groups:
                group["lr"] = lr
                for parameter in group["params"]:
                    if factor < 1.0 and parameter.grad is not None:
                        parameter.grad.mul_(factor)
            self._optimizer.step_with_ready_grads()
        self._optimizer.zero_grad()
        self._model.zero_grad_buffer()
        return norm

    def reload_masters(self) -> None:
        """Take the masters from the parameters, after these were replaced."""
        self._optimizer.reload_model_params()

    def stream(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield step count, moments and masters; no moments before the first step."""
        if self._has_masters:
            yield from self._named("master", lambda main, state: main)
        counts = [float(s[STEP]) for _, _, _, s in self._shards() if STEP in s]
        count = torch.tensor([max(counts, default=0.0)], device=self._weights.device)
        dist.all_reduce(count, dist.ReduceOp.MAX)
        if not float(count):
            return
        yield STEP, count
        for kind in MOMENTS:
            yield from self._named(kind, lambda main, state, kind=kind: state[kind])

    def check_state(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Check that a saved state is of this model.

        Raises:
            ValueError: a name or shape that does not belong, or a missing one.
        """
        kinds = (*(("master",) if self._has_masters else ()), *(MOMENTS if STEP in shapes else ()))
        wanted = {f"{k}/{n}": shape for k in kinds for n, shape in self._weights.shapes.items()}
        for key, shape in shapes.items():
            if key != STEP and wanted.get(key) != shape:
                raise ValueError(
                    f"optimizer state {key} {shape} belongs to no tensor of this model"
                )
        for key in wanted.keys() - shapes.keys():
            raise ValueError(f"optimizer state lacks {key}")

    @torch.no_grad()
    def load_state(self, read: Callable[[str], torch.Tensor], names: frozenset[str]) -> None:
        """Restore what `stream` yielded; call `check_state` first."""
        for part in self._parts:
            part.optimizer.state.clear()
        for entry in self._weights.entries:
            owned = [found for p in self._weights.copies(entry) for found in self._shards_of(p)]
            if not owned:
                continue
            kinds = (("master",) if self._has_masters else ()) + (MOMENTS if STEP in names else ())
            for kind in kinds:
                whole = self._weights.part(entry, {n: read(f"{kind}/{n}") for n in entry.tensors})
                for part, parameter, main, state in owned:
                    start, stop = _range(part, parameter)
                    shard = whole.reshape(-1)[start:stop].to(main.device, main.dtype)
                    if kind == "master":
                        main.copy_(shard)
                    else:
                        state[kind] = shard.clone()
            if STEP in names:
                for part, _, main, state in owned:
                    _set_step(part, main, state, read(STEP))

    def _named(
        self, kind: str, pick: Callable[[torch.Tensor, dict[str, Any]], torch.Tensor]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        def gathered(entry: Entry, parameter: torch.nn.Parameter) -> torch.Tensor:
            whole = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
            for part, _, main, state in self._shards_of(parameter):
                start, stop = _range(part, parameter)
                whole[start:stop] = pick(main, state)
            dist.all_reduce(whole, group=_data_group(entry))
            return whole.view(parameter.shape)

        for name, tensor in self._weights.stream(gathered, torch.float32):
            yield f"{kind}/{name}", tensor

    def _shards(self) -> Iterator[tuple[Any, Any, torch.Tensor, dict[str, Any]]]:
        for entry in self._weights.entries:
            for parameter in self._weights.copies(entry):
                yield from self._shards_of(parameter)

    def _shards_of(
        self, parameter: torch.nn.Parameter
    ) -> Iterator[tuple[Any, Any, torch.Tensor, dict[str, Any]]]:
        """Yield the optimizer that steps a range of the parameter here, with its master."""
        for part in self._parts:
            if parameter in part.model_param_group_index_map:
                group, order = part.model_param_group_index_map[parameter]
                main = part.optimizer.param_groups[group]["params"][order]
                yield part, parameter, main, part.optimizer.state[main]


def _range(part: Any, parameter: torch.nn.Parameter) -> tuple[int, int]:
    found = part._get_model_param_range_map(parameter)["param"]
    return found.start, found.end


def _set_step(part: Any, main: torch.Tensor, state: dict[str, Any], count: torch.Tensor) -> None:
    """Restore the step count where this Adam keeps it: beside the moments, or in the group."""
    if STEP in part.optimizer.param_groups[0]:
        for group in part.optimizer.param_groups:
            group[STEP] = int(count)
    else:
        state[STEP] = torch.tensor(float(count), dtype=torch.float32)


def _data_group(entry: Entry) -> Any:
    state = core.parallel_state
    if entry.expert is None:
        return state.get_data_parallel_group(with_context_parallel=True)
    return state.get_expert_data_parallel_group()
