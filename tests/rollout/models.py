"""Tiny random Qwen3 models, and transformers' forward of them as the independent reference."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

VOCAB = 29

TOLERANCE = {torch.float64: 1e-10, torch.float32: 5e-5, torch.bfloat16: 0.12}

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
}

State = dict[str, torch.Tensor]


def write_model_dir(path: Path, *, tied: bool, **changes: Any) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    config = CONFIG | {"tie_word_embeddings": tied} | changes
    (path / "config.json").write_text(json.dumps(config))
    return path


def make_state(seed: int, *, tied: bool, dtype: torch.dtype) -> State:
    """Random published weights, large enough that two versions disagree on every token."""
    generator = torch.Generator().manual_seed(seed)
    model = _model(tied, dtype)
    state: State = {}
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        centre = 1.0 if parameter.dim() == 1 else 0.0
        state[name] = (centre + 0.25 * noise).to(dtype)
    return state


def reference_logprobs(
    state: Mapping[str, torch.Tensor],
    token_ids: Sequence[int],
    *,
    tied: bool,
    temperature: float = 1.0,
) -> list[float]:
    """Log-prob of every token given those before it (0 first), the whole sequence in one call."""
    dtype = next(iter(state.values())).dtype
    model = _model(tied, dtype)
    with torch.inference_mode():
        model.load_state_dict(dict(state), strict=False)
        logits = model(input_ids=torch.tensor([list(token_ids)])).logits[0]
        high = logits if dtype == torch.float64 else logits.float()
        logprobs = torch.log_softmax(high / temperature, -1)
    chosen = logprobs[:-1].gather(-1, torch.tensor(list(token_ids)[1:])[:, None])
    return [0.0, *chosen.squeeze(-1).double().tolist()]


@lru_cache
def _model(tied: bool, dtype: torch.dtype) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(**CONFIG | {"tie_word_embeddings": tied})
    config._attn_implementation = "sdpa"  # eager computes its softmax in float32
    model = Qwen3ForCausalLM(config).to(dtype).eval()
    if dtype == torch.float64:
        for module in model.modules():
            if type(module).__name__ == "Qwen3RMSNorm":
                module.forward = _wide_norm(module)  # transformers computes it in float32
    return model


def _wide_norm(module: Any) -> Any:
    def forward(x: torch.Tensor) -> torch.Tensor:
        variance = x.pow(2).mean(-1, keepdim=True)
        return module.weight * (x * torch.rsqrt(variance + module.variance_epsilon))

    return forward
