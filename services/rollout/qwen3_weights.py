"""The engine's own copy of the weights, in its compute dtype, laid out for the forward.

Projections that read the same input lie in one tensor; the published names are views into it, so
that a digest over the views is a digest of what the forward reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass

import torch

from services.rollout.qwen3_config import Qwen3Config
from services.rollout.state_check import check_state
from shared.weights.digests import spec, specs, version_digest

EMBED = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
FINAL_NORM = "model.norm.weight"


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One block. H hidden, N heads, K key-value heads, D head size, F intermediate, E experts."""

    input_norm_H: torch.Tensor
    qkv: torch.Tensor
    """[(N + 2 K) D, H]."""
    qk_norm: torch.Tensor
    """[N + K, D]: derived from q_norm (with the attention scale folded in) and k_norm."""
    q_norm_D: torch.Tensor
    k_norm_D: torch.Tensor
    out: torch.Tensor
    post_norm_H: torch.Tensor
    gate_up: torch.Tensor
    """[2 F, H], of a layer with experts [E, 2 F, H]."""
    down: torch.Tensor
    """[H, F], of a layer with experts [E, H, F]."""
    router_EH: torch.Tensor | None
    """None: the layer is dense."""


def cast_state(
    state: Mapping[str, torch.Tensor], names: Set[str], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Return copies of the named tensors in `dtype`, the one cast of the engine."""
    return {name: state[name].detach().to(dtype, copy=True) for name in sorted(names)}


def cast_digest(state: Mapping[str, torch.Tensor], dtype: torch.dtype) -> str:
    """Return the digest that a device copy of `state` in `dtype` must have; casts one at a time."""
    return version_digest(spec(name, state[name].detach().to(dtype)) for name in state)


class DeviceWeights:
    """All weights in compute dtype; written only by `write`."""

    def __init__(self, config: Qwen3Config, dtype: torch.dtype) -> None:
        self.config = config
        self.dtype = dtype
        self.embed_VH = torch.zeros(config.vocab_size, config.hidden_size, dtype=dtype)
        self.head_VH = self.embed_VH if config.tied else torch.zeros_like(self.embed_VH)
        self.final_norm_H = torch.zeros(config.hidden_size, dtype=dtype)
        self.layers = tuple(
            _empty_layer(config, dtype, experts=index in config.expert_layers)
            for index in range(config.num_layers)
        )
        self._views: dict[str, torch.Tensor] = {EMBED: self.embed_VH, FINAL_NORM: self.final_norm_H}
        if not config.tied:
            self._views[HEAD] = self.head_VH
        for index, layer in enumerate(self.layers):
            self._views.update(_named_views(config, layer, f"model.layers.{index}"))

    @property
    def names(self) -> Set[str]:
        """Published names of all tensors."""
        return self._views.keys()

    def check(self, state: Mapping[str, torch.Tensor]) -> None:
        """Compare names, shapes and kinds with the model.

        Raises:
            ValueError: names both sides of the first disagreement.
        """
        shapes = {name: view.shape for name, view in self._views.items()}
        check_state(state, shapes, self.dtype)

    def write(self, cast: Mapping[str, torch.Tensor]) -> None:
        """Overwrite the named tensors and whatever is derived from them."""
        for name, tensor in cast.items():
            self._views[name].copy_(tensor)
        for layer in self.layers:
            _derive(self.config, layer)

    def digest(self) -> str:
        """Digest of the device copy, comparable with `cast_digest`."""
        return version_digest(specs(self._views))


def _empty_layer(config: Qwen3Config, dtype: torch.dtype, *, experts: bool) -> LayerWeights:
    hidden, heads, kv_heads = config.hidden_size, config.num_heads, config.num_kv_heads
    size, inner = config.head_dim, config.expert_size if experts else config.intermediate_size
    stacked = (config.num_experts,) if experts else ()

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(*shape, dtype=dtype)

    return LayerWeights(
        input_norm_H=zeros(hidden),
        qkv=zeros((heads + 2 * kv_heads) * size, hidden),
        qk_norm=zeros(heads + kv_heads, size),
        q_norm_D=zeros(size),
        k_norm_D=zeros(size),
        out=zeros(hidden, heads * size),
        post_norm_H=zeros(hidden),
        gate_up=zeros(*stacked, 2 * inner, hidden),
        down=zeros(*stacked, hidden, inner),
        router_EH=zeros(config.num_experts, hidden) if experts else None,
    )


def _named_views(config: Qwen3Config, layer: LayerWeights, prefix: str) -> dict[str, torch.Tensor]:
    q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    q, k, v = layer.qkv.split([q_rows, kv_rows, kv_rows])
    views = {
        f"{prefix}.input_layernorm.weight": layer.input_norm_H,
        f"{prefix}.self_attn.q_proj.weight": q,
        f"{prefix}.self_attn.k_proj.weight": k,
        f"{prefix}.self_attn.v_proj.weight": v,
        f"{prefix}.self_attn.q_norm.weight": layer.q_norm_D,
        f"{prefix}.self_attn.k_norm.weight": layer.k_norm_D,
        f"{prefix}.self_attn.o_proj.weight": layer.out,
        f"{prefix}.post_attention_layernorm.weight": layer.post_norm_H,
    }
    if layer.router_EH is None:
        return views | _mlp_views(layer.gate_up, layer.down, f"{prefix}.mlp")
    views[f"{prefix}.mlp.gate.weight"] = layer.router_EH
    for expert in range(config.num_experts):
        name = f"{prefix}.mlp.experts.{expert}"
        views.update(_mlp_views(layer.gate_up[expert], layer.down[expert], name))
    return views


def _mlp_views(gate_up: torch.Tensor, down: torch.Tensor, prefix: str) -> dict[str, torch.Tensor]:
    gate, up = gate_up.chunk(2)
    return {
        f"{prefix}.gate_proj.weight": gate,
        f"{prefix}.up_proj.weight": up,
        f"{prefix}.down_proj.weight": down,
    }


def _derive(config: Qwen3Config, layer: LayerWeights) -> None:
    layer.qk_norm[: config.num_heads] = layer.q_norm_D * config.head_dim**-0.5
    layer.qk_norm[config.num_heads :] = layer.k_norm_D
