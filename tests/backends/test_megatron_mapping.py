"""Names, cuts and joins of the megatron backend; no megatron-core needed."""

import pytest
import torch

from shared.backends.megatron.layout import Layout, Shape
from shared.backends.megatron.mapping import cut, entries, hf_shapes, join

CONFIG = {
    "model_type": "qwen3",
    "num_hidden_layers": 4,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "vocab_size": 37,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
}
MOE = {
    **CONFIG,
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
}


@pytest.mark.parametrize("config", [CONFIG, MOE, {**CONFIG, "model_type": "llama"}])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_what_is_cut_is_joined_bit_for_bit(config: dict, ranks: int):
    shape = Shape.of(config)
    generator = torch.Generator().manual_seed(0)
    tensors = {n: torch.randn(s, generator=generator) for n, s in hf_shapes(shape).items()}
    seen: set[str] = set()
    for entry in entries(shape):
        own = [tensors[name] for name in entry.tensors]
        count = 1 if entry.expert is not None else ranks
        parts = [cut(entry, own, shape, rank, count) for rank in range(count)]
        assert len({tuple(part.shape) for part in parts}) == 1
        for name, joined in zip(entry.tensors, join(entry, parts, shape), strict=True):
            assert torch.equal(joined, tensors[name])
            seen.add(name)
    assert seen == tensors.keys()


def test_queries_lie_beside_the_keys_and_values_of_their_group():
    shape = Shape.of(CONFIG)
    qkv = next(entry for entry in entries(shape) if entry.cut == "qkv")
    q, k, v = (torch.arange(h * 8)[:, None].expand(-1, 32) + base for h, base in
               ((8, 0), (4, 1000), (4, 2000)))  # fmt: skip
    second = cut(qkv, [q, k, v], shape, 1, 4)[:, 0]
    want = [*range(16, 32), *range(1008, 1016), *range(2008, 2016)]
    assert second.tolist() == want


def test_padded_rows_are_zero_behind_the_last_real_one():
    shape = Shape.of(CONFIG)
    embedding = next(entries(shape))
    last = cut(embedding, [torch.ones(37, 32)], shape, 1, 2)
    assert shape.padded_vocab(2) == 48
    assert last[:13].eq(1).all()
    assert last[13:].eq(0).all()


@pytest.mark.parametrize(
    ("layout", "config", "names"),
    [
        (Layout(tp=3), CONFIG, "tp 3 does not divide num_attention_heads 8"),
        (Layout(tp=8), CONFIG, "tp 8 does not divide num_key_value_heads 4"),
        (Layout(tp=2), {**CONFIG, "intermediate_size": 33}, "intermediate_size 33"),
        (Layout(pp=3), CONFIG, "pp 3 does not divide num_hidden_layers 4"),
        (Layout(ep=3), MOE, "ep 3 does not divide num_experts 4"),
        (Layout(ep=2), CONFIG, "has no experts"),
        (Layout(tp=4), {**CONFIG, "vocab_size": 20}, "vocab_size 20"),
        (Layout(sp=True), CONFIG, "sp needs tp"),
        (Layout(tp=2), MOE, "experts with tp 2 need sp"),
    ],
)
def test_a_layout_that_does_not_divide_the_model_is_refused(layout, config, names: str):
    with pytest.raises(ValueError, match=names):
        Shape.of(config).check(layout)


def test_experts_are_laid_out_over_tensor_and_sequence_parallel_ranks():
    Shape.of(MOE).check(Layout(tp=2, sp=True, ep=2))


@pytest.mark.parametrize(
    ("layout", "world"), [(Layout(tp=2), 3), (Layout(ep=4), 2), (Layout(pp=0), 1)]
)
def test_ranks_that_do_not_divide_are_refused(layout: Layout, world: int):
    with pytest.raises(ValueError, match="layout: "):
        layout.data_ranks(world)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"model_type": "martian"}, "martian"),
        ({"attention_bias": True}, "attention_bias"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "yarn"),
        ({"hidden_act": "gelu"}, "gelu"),
    ],
)
def test_what_is_not_mapped_is_refused_by_name(change: dict, names: str):
    with pytest.raises(ValueError, match=names):
        Shape.of({**CONFIG, **change})
    missing = {k: v for k, v in CONFIG.items() if k != "hidden_size"}
    with pytest.raises(ValueError, match="no hidden_size"):
        Shape.of(missing)
