"""The audit's own mixture of experts against transformers in float64, free and by record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from shared.cli import reference_forward
from shared.cli.audit_rescoring import query_of
from shared.cli.reference_forward import Query, ReferenceConfig, ReferencePolicy, read_safetensors
from shared.wire.base import Array
from shared.wire.trajectory import RoutingRecord, Sequence, Span
from tests.cli.test_reference_forward import KeepFloat64

LAYERS, EXPERTS, CHOICES, THETA = (0, 2), 6, 2, 5000.0
"""Layer 1 is dense."""


@pytest.fixture(params=[True, False], ids=["renormalised", "as_they_are"])
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(3)
    config = Qwen3MoeConfig(
        vocab_size=37, hidden_size=32, intermediate_size=48, moe_intermediate_size=24,
        num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=12,
        num_experts=EXPERTS, num_experts_per_tok=CHOICES, norm_topk_prob=request.param,
        mlp_only_layers=[1], tie_word_embeddings=True, attn_implementation="eager",
        experts_implementation="eager",
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
    )  # fmt: skip
    made = Qwen3MoeForCausalLM(config).double().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(4.0).add_(torch.randn_like(parameter) * 0.3)
    made.model.rotary_emb.inv_freq = THETA ** -(torch.arange(0, 12, 2, dtype=torch.float64) / 12)
    return made


@pytest.fixture
def reference(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ReferencePolicy:
    def angles(config: ReferenceConfig, length: int) -> np.ndarray:
        halves = np.arange(0, config.head_dim, 2) / config.head_dim
        return np.arange(length)[:, None] * config.rope_theta**-halves

    monkeypatch.setattr(reference_forward, "rotary_angles", angles)
    model.config.save_pretrained(tmp_path)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            for number, both in enumerate(tensor):
                for part, half in zip(("gate", "up"), both.chunk(2), strict=True):
                    place = name.replace("gate_up_proj", f"{number}.{part}_proj.weight")
                    tensors[place] = half.contiguous()
        elif name.endswith("experts.down_proj"):
            for number, down in enumerate(tensor):
                tensors[name.replace("down_proj", f"{number}.down_proj.weight")] = down.contiguous()
        elif name != "lm_head.weight":
            tensors[name] = tensor.contiguous()
    save_file(tensors, tmp_path / "w.safetensors")
    return ReferencePolicy(
        ReferenceConfig.read(tmp_path), read_safetensors(tmp_path / "w.safetensors")
    )


def forward(
    model: Any, ids: np.ndarray, routing: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return log-probs [T - 1] and the experts taken [T, layers, K], by transformers."""
    taken: list[np.ndarray] = []

    def hook(router: Any, _: Any, output: Any) -> Any:
        logits, scores, chosen = output
        if routing is not None:
            given = torch.as_tensor(routing[:, len(taken)])
            chosen = torch.where(given < 0, chosen, given)
            scores = torch.softmax(logits, -1).gather(-1, chosen)
            if router.norm_topk_prob:
                scores = scores / scores.sum(-1, keepdim=True)
        taken.append(chosen.numpy())
        return logits, scores, chosen

    hooks = [model.model.layers[n].mlp.gate.register_forward_hook(hook) for n in LAYERS]
    try:
        with torch.no_grad(), KeepFloat64():
            logits = model(torch.as_tensor(ids)[None].long()).logits[0]
    finally:
        for one in hooks:
            one.remove()
    logprobs = torch.log_softmax(logits, -1)[np.arange(len(ids) - 1), ids[1:]]
    return logprobs.numpy(), np.stack(taken, 1)


IDS = np.random.default_rng(0).integers(0, 37, 30).astype(np.int32)
WHERE = np.arange(1, 30)


def test_left_to_the_router_it_equals_transformers(model: Any, reference: ReferencePolicy) -> None:
    expected, taken = forward(model, IDS, None)
    assert len(np.unique(taken)) == EXPERTS
    short = Query(IDS[:11], np.arange(1, 11), 1.0)
    got, cut = reference.logprobs([Query(IDS, WHERE), short])
    assert np.abs(got - expected).max() < 1e-9
    assert np.abs(cut - expected[:10]).max() < 1e-9


def test_recorded_experts_are_taken_token_for_token(model: Any, reference: ReferencePolicy) -> None:
    rng = np.random.default_rng(1)
    routing = np.stack(
        [[rng.permutation(EXPERTS)[:CHOICES] for _ in LAYERS] for _ in range(len(IDS))]
    )
    routing[10:20] = -1
    expected, taken = forward(model, IDS, routing)
    assert np.array_equal(taken[:10], routing[:10])
    (got,) = reference.logprobs([Query(IDS, WHERE, 1.0, routing)])
    assert np.abs(got - expected).max() < 1e-9
    (free,) = reference.logprobs([Query(IDS, WHERE)])
    assert np.abs(got - free).max() > 0.1
    (shifted,) = reference.logprobs([Query(IDS, WHERE, 1.0, np.roll(routing, 1, axis=0))])
    assert np.abs(got - shifted).max() > 0.1


@pytest.mark.parametrize("model", [True], indirect=True)
def test_routing_of_another_model_is_refused(reference: ReferencePolicy) -> None:
    routing = np.zeros((30, 3, 2), dtype=np.int64)
    with pytest.raises(ValueError, match="3 layers and 2 choices: the model has 2 and 2"):
        reference.logprobs([Query(IDS, WHERE, 1.0, routing)])


def test_a_query_asks_with_what_its_version_recorded() -> None:
    def record(version: int, start: int, ids: list[int]) -> RoutingRecord:
        experts = Array.of(np.array(ids)[:, None, None], "u1")
        return RoutingRecord(version=version, start=start, stop=start + len(ids), experts=experts)

    sequence = Sequence(
        token_ids=Array.of(range(5), "i4"),
        loss_mask=Array.of([0, 0, 1, 1, 1], "u1"),
        spans=(Span(version=3, start=2, stop=4), Span(version=4, start=4, stop=5)),
        arrays={"sampler_logprobs": Array.of([0.0] * 5, "f4")},
        routing=(record(3, 0, [1, 2, 3]), record(4, 0, [5, 6, 7, 8]), record(3, 2, [9, 9])),
    )

    def column(version: int | None) -> list[int]:
        routing = query_of(sequence, version, np.array([4]), 1.0).routing
        assert routing is not None
        return routing[:, 0, 0].tolist()

    assert column(3) == [1, 2, 3, 9, -1]
    assert column(4) == [5, 6, 7, 8, -1]
    assert column(None) == [1, 2, 3, 8, -1]
    bare = sequence.model_copy(update={"routing": ()})
    assert query_of(bare, 3, np.array([4]), 1.0).routing is None
