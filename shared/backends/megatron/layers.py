"""Layers where TransformerEngine is not used, with the arithmetic of transformers' own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from shared.backends.packed_attention import packed_attention


class RMSNorm(torch.nn.Module):
    """weight · x / rms(x): float32 inside, rounded to x's dtype before the weight."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # marks the parameter whose gradient is partial where tokens are split over ranks
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last dimension."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class PackedCoreAttention(torch.nn.Module):
    """Causal attention inside each packed sequence (`packed_attention.py`)."""

    def __init__(self, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query_THF: torch.Tensor,
        key_THF: torch.Tensor,
        value_THF: torch.Tensor,
        attention_mask: None,
        *,
        packed_seq_params: Any,
        **_: Any,
    ) -> torch.Tensor:
        """Return [T, heads, head_dim]."""
        query, key, value = (x.transpose(0, 1)[None] for x in (query_THF, key_THF, value_THF))
        packed_1THF, _none = packed_attention(
            self,
            query,
            key,
            value,
            attention_mask,
            scaling=self.softmax_scale,
            attention_plan=packed_seq_params.plan,
        )
        return packed_1THF[0]


def local_layer(specs: Any, *, num_experts: int, qk_norm: bool) -> Any:
    """Return megatron-core's local layer with our norm and attention in it."""
    spec = specs.get_gpt_layer_local_spec(
        num_experts=num_experts or None,
        moe_grouped_gemm=False,
        qk_layernorm=qk_norm,
        normalization="RMSNorm",
    )
    parts = spec.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
    attention = parts.self_attention.submodules
    attention.core_attention = PackedCoreAttention
    if qk_norm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return spec


def hidden_states_only(model: Any) -> None:
    """Let the last stage return its hidden states: log-probs need no logits in memory."""
    forward: Callable[..., torch.Tensor] = _hidden_states
    model._postprocess = forward


def _hidden_states(*, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
    return hidden_states
