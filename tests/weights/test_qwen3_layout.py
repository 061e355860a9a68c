"""What the layout of Qwen3 refuses; what it is, the patches show."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from shared.weights.qwen3_layout import Qwen3Shape, qwen3_layout
from tests.weights.qwen3_shards import (
    DENSE,
    MOE,
    WHOLE_EXPERTS,
)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "llama"}, "'llama' has another layout"),
        ({"model_type": "qwen3", "attention_bias": True}, "attention_bias"),
        ({"model_type": "qwen3", "num_hidden_layers": 1}, "'num_attention_heads' is missing"),
    ],
)
def test_configs_of_other_layouts_are_refused(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Qwen3Shape.of(config)


@pytest.mark.parametrize("key", ["num_experts", "num_local_experts"])
def test_experts_are_counted_under_either_name(key: str) -> None:
    config = {
        "model_type": "qwen3_moe", "vocab_size": 70, "hidden_size": 8, "intermediate_size": 16,
        "num_hidden_layers": 1, "num_attention_heads": 2, "moe_intermediate_size": 8,
    }  # fmt: skip
    assert Qwen3Shape.of({**config, key: 4}).num_experts == 4
    with pytest.raises(ValueError, match="'num_experts' is missing"):
        Qwen3Shape.of(config)


def test_models_that_do_not_divide_among_the_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"8 heads and 2 key-value heads .* among 3 ranks"):
        qwen3_layout(DENSE, 0, 3)
    with pytest.raises(ValueError, match=r"8 heads and 3 key-value heads .* among 2 ranks"):
        qwen3_layout(replace(DENSE, num_kv_heads=3), 0, 2)
    few = replace(MOE, num_experts=3)
    with pytest.raises(ValueError, match="rank 3 of 4 holds none of 3 experts"):
        qwen3_layout(few, 3, 4, WHOLE_EXPERTS)


def test_a_rank_holds_whole_heads_gate_before_up_and_stacked_experts() -> None:
    """By hand for rank 5 of 8: query head 5, key-value head 1 of 2 (a copy: rank 4 owns it)."""
    attention, mlp = "model.layers.0.self_attn", "model.layers.0.mlp"
    dense = qwen3_layout(DENSE, 5, 8).tensors
    qkv = dense[f"{attention}.qkv_proj.weight"]
    assert qkv.shape == (12, 6)
    assert [(str(p.piece), p.offset, p.owned) for p in qkv.placements] == [
        (f"{attention}.q_proj.weight[20:24, 0:6]", (0, 0), True),
        (f"{attention}.k_proj.weight[4:8, 0:6]", (4, 0), False),
        (f"{attention}.v_proj.weight[4:8, 0:6]", (8, 0), False),
    ]
    gate_up = dense[f"{mlp}.gate_up_proj.weight"]
    assert [(str(p.piece), p.offset) for p in gate_up.placements] == [
        (f"{mlp}.gate_proj.weight[10:12, 0:6]", (0, 0)),
        (f"{mlp}.up_proj.weight[10:12, 0:6]", (2, 0)),
    ]
    assert dense["model.embed_tokens.weight"].shape == (16, 6)
    assert "lm_head.weight" not in dense
    experts = qwen3_layout(MOE, 5, 8).tensors
    w2 = experts[f"{mlp}.experts.routed_experts.w2_weight"]
    assert w2.shape == (10, 6, 1)
    assert str(w2.placements[3].piece) == f"{mlp}.experts.3.down_proj.weight[0:6, 5:6]"
    assert w2.placements[3].offset == (3, 0, 0)
    w13 = experts[f"{mlp}.experts.routed_experts.w13_weight"].placements
    assert {p.offset for p in w13 if p.source.endswith("7.up_proj.weight")} == {(7, 1, 0)}
