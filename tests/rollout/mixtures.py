"""A tiny random Qwen3 mixture of experts: transformers' forward of it, and its routing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tests.rollout.models import CONFIG as DENSE
from tests.rollout.models import State

CONFIG: dict[str, Any] = DENSE | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "moe_intermediate_size": 48,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [1],
}
LAYERS = (0, 2)
"""With experts."""
CHOICES: int = CONFIG["num_experts_per_tok"]


def write_mixture_dir(path: Path, **changes: Any) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(CONFIG | changes))
    return path


def make_mixture_state(seed: int, dtype: torch.dtype = torch.float32) -> State:
    """Random published weights, one tensor per expert."""
    generator = torch.Generator().manual_seed(seed)
    state: State = {}
    for name, shape in _published_shapes().items():
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        centre = 1.0 if len(shape) == 1 else 0.0
        scale = 0.3 if name.endswith("mlp.gate.weight") else 0.2
        state[name] = (centre + scale * noise).to(dtype)
    return state


class Expected:
    """What the reference makes of a sequence, all of it under one state.

    With `experts` [T, L, K] it takes those, each with the weight that its own router gives it.
    """

    def __init__(
        self,
        state: Mapping[str, torch.Tensor],
        token_ids: Sequence[int],
        experts: npt.NDArray[Any] | None = None,
    ) -> None:
        model = _model(next(iter(state.values())).dtype)
        probabilities: list[torch.Tensor] = []

        def route(_module: Any, _args: Any, output: Any) -> Any:
            logits_TE, scores_TK, _ = output
            probabilities.append(logits_TE.float().softmax(-1))
            if experts is None:
                return None
            layer = len(probabilities) - 1
            taken_TK = torch.from_numpy(experts[:, layer].astype(np.int64))
            weights_TK = probabilities[-1].gather(-1, taken_TK)
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
            return logits_TE, weights_TK.to(scores_TK.dtype), taken_TK

        hooks = [
            model.model.layers[layer].mlp.gate.register_forward_hook(route) for layer in LAYERS
        ]
        with torch.inference_mode():
            model.load_state_dict(_stacked(state))
            logits = model(input_ids=torch.tensor([list(token_ids)])).logits[0].float()
        for hook in hooks:
            hook.remove()
        logprobs = torch.log_softmax(logits, -1)[:-1]
        chosen = logprobs.gather(-1, torch.tensor(list(token_ids)[1:])[:, None])
        self.logprobs = np.array([0.0, *chosen.squeeze(-1).tolist()])
        """f8 [T], of each token given those before it; 0 first."""
        ranked = torch.stack(probabilities, 1).sort(dim=-1, descending=True)
        self.experts: npt.NDArray[np.int64] = ranked.indices[..., :CHOICES].sort(-1)[0].numpy()
        """[T, L, K], ascending per token and layer."""
        gaps_TL = ranked.values[..., CHOICES - 1] - ranked.values[..., CHOICES]
        self.gaps: npt.NDArray[np.float32] = gaps_TL.numpy()
        """[T, L]: difference in probability between the last expert taken and the first not."""


@lru_cache
def _model(dtype: torch.dtype) -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(**CONFIG)
    config._attn_implementation = "sdpa"
    config._experts_implementation = "eager"
    return Qwen3MoeForCausalLM(config).to(dtype).eval()


def _published_shapes() -> dict[str, tuple[int, ...]]:
    from shared.weights.qwen3_layout import Qwen3Shape, qwen3_layout

    return qwen3_layout(Qwen3Shape.of(CONFIG), 0, 1).sources


def _stacked(state: Mapping[str, torch.Tensor]) -> State:
    """The names of transformers: experts of a layer in two tensors."""
    stacked = {name: tensor for name, tensor in state.items() if ".experts." not in name}
    for layer in LAYERS:
        prefix = f"model.layers.{layer}.mlp.experts"
        parts = {
            part: [state[f"{prefix}.{e}.{part}.weight"] for e in range(CONFIG["num_experts"])]
            for part in ("gate_proj", "up_proj", "down_proj")
        }
        pairs = zip(parts["gate_proj"], parts["up_proj"], strict=True)
        stacked[f"{prefix}.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in pairs])
        stacked[f"{prefix}.down_proj"] = torch.stack(parts["down_proj"])
    return stacked
