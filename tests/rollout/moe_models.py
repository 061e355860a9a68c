"""Tiny random Qwen3 mixtures of experts, and transformers' forward and router as the reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from shared.backends.hf_model import widen_norms
from shared.backends.hf_names import owners, published_places, write
from tests.rollout.models import CONFIG, State, write_model_dir

MOE: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_hidden_layers": 3,
    "mlp_only_layers": [1],
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
}
"""Three layers, the middle one dense."""

LAYERS, CHOICES = 2, 2


def write_moe_dir(path: Path, **changes: Any) -> Path:
    return write_model_dir(path, tied=False, **MOE | changes)


def make_moe_state(seed: int, dtype: torch.dtype, *, renormalised: bool = True) -> State:
    """Random published weights, one matrix per expert."""
    generator = torch.Generator().manual_seed(seed)
    model = _model(dtype, renormalised)
    held, state = owners(model), {}
    for name, place in published_places(model).items():
        shape = place.of(held[place.owner]).shape
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        state[name] = ((1.0 if len(shape) == 1 else 0.0) + 0.25 * noise).to(dtype)
    return state


def moe_reference(
    state: Mapping[str, torch.Tensor],
    token_ids: Sequence[int],
    *,
    renormalised: bool = True,
    temperature: float = 1.0,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Log-probs [T] of every token given those before it (0 first), and its experts [T, L, K]."""
    model = _model(next(iter(state.values())).dtype, renormalised)
    held = owners(model)
    chosen: list[torch.Tensor] = []
    routers = [m for n, m in model.named_modules() if n.endswith(".mlp.gate")]
    assert len(routers) == LAYERS
    hooks = [m.register_forward_hook(lambda *a: chosen.append(a[2][2])) for m in routers]
    try:
        with torch.inference_mode():
            for name, place in published_places(model).items():
                write(held[place.owner], place, state[name])
            logits = model(input_ids=torch.tensor([list(token_ids)])).logits[0].double()
    finally:
        for hook in hooks:
            hook.remove()
    logprobs = torch.log_softmax(logits / temperature, -1)[:-1]
    chosen_T = logprobs.gather(-1, torch.tensor(list(token_ids)[1:])[:, None]).squeeze(-1)
    return np.concatenate([[0.0], chosen_T.numpy()]), torch.stack(chosen, 1).numpy()


@lru_cache
def _model(dtype: torch.dtype, renormalised: bool) -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    fields = CONFIG | MOE | {"norm_topk_prob": renormalised}
    config = Qwen3MoeConfig(**{k: v for k, v in fields.items() if k != "model_type"})
    config._attn_implementation = "sdpa"  # eager computes its softmax in float32
    config._experts_implementation = "eager"  # the default knows no float64
    model = Qwen3MoeForCausalLM(config).to(dtype).eval()
    if dtype == torch.float64:
        widen_norms(model)
    return model
