"""Small Qwen3 models, and what vLLM holds of them on every rank, said in plain torch.

`sharded` follows vLLM 0.32's weight loaders, written apart from the layouts that it judges.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from shared.weights.bits import same_bits
from shared.weights.deltas import BytesSource, DeltaReader
from shared.weights.digests import MASK, tensor_digest
from shared.weights.local_digests import ShardDigests, local_digests
from shared.weights.local_patches import LocalPatch, resolve
from shared.weights.qwen3_layout import EngineChoices, Qwen3Shape, qwen3_layout

State = dict[str, torch.Tensor]

DENSE = Qwen3Shape.of(
    {
        "model_type": "qwen3",
        "vocab_size": 70,
        "hidden_size": 6,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "tie_word_embeddings": True,
    }
)
MOE = Qwen3Shape.of(
    {
        "model_type": "qwen3_moe",
        "vocab_size": 70,
        "hidden_size": 6,
        "intermediate_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 4,
        "num_experts": 10,
        "moe_intermediate_size": 8,
        "mlp_only_layers": [1],
    }
)
STACKED = EngineChoices(stacked_source=True)
WHOLE_EXPERTS = EngineChoices(expert_parallel=True)
MODELS = {
    "dense": (DENSE, EngineChoices()),
    "experts": (MOE, EngineChoices()),
    "experts, stacked source": (MOE, STACKED),
    "whole experts": (MOE, WHOLE_EXPERTS),
    "whole experts, stacked source": (MOE, replace(STACKED, expert_parallel=True)),
    "swapped halves": (MOE, EngineChoices(gate_first=False, experts_name="moe")),
}
BF16 = torch.bfloat16


def shapes_of(shape: Qwen3Shape, choices: EngineChoices) -> dict[str, tuple[int, ...]]:
    hidden, size = shape.hidden_size, shape.head_dim
    q, kv = shape.num_heads * size, shape.num_kv_heads * size
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (shape.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not shape.tied:
        shapes["lm_head.weight"] = (shape.vocab_size, hidden)
    for i in range(shape.num_layers):
        layer = f"model.layers.{i}"
        shapes |= {
            f"{layer}.input_layernorm.weight": (hidden,),
            f"{layer}.post_attention_layernorm.weight": (hidden,),
            f"{layer}.self_attn.q_proj.weight": (q, hidden),
            f"{layer}.self_attn.k_proj.weight": (kv, hidden),
            f"{layer}.self_attn.v_proj.weight": (kv, hidden),
            f"{layer}.self_attn.o_proj.weight": (hidden, q),
            f"{layer}.self_attn.q_norm.weight": (size,),
            f"{layer}.self_attn.k_norm.weight": (size,),
        }
        inner, experts = shape.moe_intermediate_size, f"{layer}.mlp.experts"
        if i not in shape.moe_layers:
            for name in ("gate_proj", "up_proj"):
                shapes[f"{layer}.mlp.{name}.weight"] = (shape.intermediate_size, hidden)
            shapes[f"{layer}.mlp.down_proj.weight"] = (hidden, shape.intermediate_size)
            continue
        shapes[f"{layer}.mlp.gate.weight"] = (shape.num_experts, hidden)
        if choices.stacked_source:
            shapes[f"{experts}.gate_up_proj"] = (shape.num_experts, 2 * inner, hidden)
            shapes[f"{experts}.down_proj"] = (shape.num_experts, hidden, inner)
        else:
            for e in range(shape.num_experts):
                shapes[f"{experts}.{e}.gate_proj.weight"] = (inner, hidden)
                shapes[f"{experts}.{e}.up_proj.weight"] = (inner, hidden)
                shapes[f"{experts}.{e}.down_proj.weight"] = (hidden, inner)
    return shapes


def make_state(shape: Qwen3Shape, choices: EngineChoices, seed: int = 0) -> State:
    g = torch.Generator().manual_seed(seed)
    shapes = shapes_of(shape, choices)
    return {name: torch.randn(s, generator=g).to(BF16) for name, s in shapes.items()}


def next_state(state: State, seed: int, share: float = 0.1) -> State:
    """Small steps, sign changes and NaNs, in some of the tensors."""
    g = torch.Generator().manual_seed(seed)
    new = {name: tensor.clone() for name, tensor in state.items()}
    for tensor in new.values():
        if torch.rand((), generator=g) < 0.2:
            continue
        bits = tensor.view(torch.int16)
        chosen = torch.rand(bits.shape, generator=g) < share
        near = bits + torch.randint(-2, 3, bits.shape, generator=g, dtype=torch.int16)
        far = torch.randint(-(2**15), 2**15, bits.shape, generator=g, dtype=torch.int16)
        is_far = torch.rand(bits.shape, generator=g) < 0.2
        bits.copy_(torch.where(chosen, torch.where(is_far, far, near), bits))
    return new


def sharded(
    state: State, shape: Qwen3Shape, choices: EngineChoices, rank: int, ranks: int
) -> State:
    """What vLLM holds of `state` on one rank, by its weight loaders."""
    local: State = {}

    def rows(tensor: torch.Tensor, part: int = rank, parts: int = ranks) -> torch.Tensor:
        return tensor.chunk(parts, 0)[part]

    def columns(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.chunk(ranks, 1)[rank]

    padded = -(-shape.vocab_size // 64) * 64
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in state:
            table = torch.zeros(padded, shape.hidden_size, dtype=BF16)
            table[: shape.vocab_size] = state[name]
            local[name] = rows(table)
    local["model.norm.weight"] = state["model.norm.weight"]
    kv_parts = min(ranks, shape.num_kv_heads)
    kv_part = rank // (ranks // kv_parts)
    for i in range(shape.num_layers):
        layer = f"model.layers.{i}"
        attention = f"{layer}.self_attn"
        q, k, v = (state[f"{attention}.{n}_proj.weight"] for n in "qkv")
        local[f"{attention}.qkv_proj.weight"] = torch.cat(
            [rows(q), rows(k, kv_part, kv_parts), rows(v, kv_part, kv_parts)]
        )
        local[f"{attention}.o_proj.weight"] = columns(state[f"{attention}.o_proj.weight"])
        for name in (
            f"{attention}.q_norm.weight",
            f"{attention}.k_norm.weight",
            f"{layer}.input_layernorm.weight",
            f"{layer}.post_attention_layernorm.weight",
        ):
            local[name] = state[name]
        if i not in shape.moe_layers:
            gate, up = (state[f"{layer}.mlp.{n}_proj.weight"] for n in ("gate", "up"))
            local[f"{layer}.mlp.gate_up_proj.weight"] = torch.cat([rows(gate), rows(up)])
            local[f"{layer}.mlp.down_proj.weight"] = columns(state[f"{layer}.mlp.down_proj.weight"])
            continue
        local[f"{layer}.mlp.gate.weight"] = state[f"{layer}.mlp.gate.weight"]
        w13, w2 = [], []
        for gate, up, down in _experts(state, f"{layer}.mlp.experts", shape):
            if not choices.expert_parallel:
                gate, up, down = rows(gate), rows(up), columns(down)
            w13.append(torch.cat([gate, up] if choices.gate_first else [up, gate]))
            w2.append(down)
        held = range(shape.num_experts)
        if choices.expert_parallel:
            held = np.array_split(np.arange(shape.num_experts), ranks)[rank].tolist()
        name = f"{layer}.{choices.experts_name}"
        local[f"{name}.w13_weight"] = torch.stack([w13[e] for e in held])
        local[f"{name}.w2_weight"] = torch.stack([w2[e] for e in held])
    return {name: tensor.clone() for name, tensor in local.items()}


def _experts(state: State, prefix: str, shape: Qwen3Shape) -> Iterator[Any]:
    for e in range(shape.num_experts):
        if f"{prefix}.gate_up_proj" in state:
            gate, up = state[f"{prefix}.gate_up_proj"][e].chunk(2)
            yield gate, up, state[f"{prefix}.down_proj"][e]
        else:
            yield tuple(
                state[f"{prefix}.{e}.{name}_proj.weight"] for name in ("gate", "up", "down")
            )


class Ranks:
    """All ranks of one engine, holding a version."""

    def __init__(
        self,
        state: State,
        num_ranks: int,
        shape: Qwen3Shape = DENSE,
        choices: EngineChoices | None = None,
    ) -> None:
        self.shape, self.choices, self.num_ranks = shape, choices or EngineChoices(), num_ranks
        self.layouts = [
            qwen3_layout(shape, rank, num_ranks, self.choices) for rank in range(num_ranks)
        ]
        self.locals = self.sharded(state)

    def sharded(self, state: State) -> list[State]:
        return [
            sharded(state, self.shape, self.choices, rank, self.num_ranks)
            for rank in range(self.num_ranks)
        ]

    def resolve(self, delta: bytes) -> list[LocalPatch]:
        return [resolve(DeltaReader(BytesSource(delta)), layout) for layout in self.layouts]

    def apply(self, patches: list[LocalPatch], *, reverse: bool = False) -> list[ShardDigests]:
        return [
            patch.apply(local, reverse=reverse)
            for patch, local in zip(patches, self.locals, strict=True)
        ]

    def digests(self) -> list[ShardDigests]:
        return [
            local_digests(local, layout)
            for local, layout in zip(self.locals, self.layouts, strict=True)
        ]

    def hold(self, state: State) -> bool:
        return all(
            local.keys() == expected.keys()
            and all(same_bits(local[name], expected[name]) for name in expected)
            for local, expected in zip(self.locals, self.sharded(state), strict=True)
        )


def published(state: State) -> dict[str, int]:
    return {name: tensor_digest(tensor) for name, tensor in state.items()}


def gain_of(old: State, new: State) -> dict[str, int]:
    before = published(old)
    return {name: (after - before[name]) & MASK for name, after in published(new).items()}
