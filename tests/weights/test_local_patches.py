"""Deltas through the layout of Qwen3 on every rank, against sharding the new state by hand.

The reference below says in plain torch what vLLM's weight loaders do.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.weights import local_digests as local_digests_module
from shared.weights import local_patches as local_patches_module
from shared.weights.bits import same_bits
from shared.weights.deltas import Block, BytesSource, DeltaReader, encode
from shared.weights.device_version import DeviceVersion
from shared.weights.digests import MASK, combined, contributions, specs, tensor_digest
from shared.weights.errors import Corrupt, WrongBase
from shared.weights.layout_parts import Source, box, replicate, tied_copy
from shared.weights.layouts import Layout, check_cover
from shared.weights.local_digests import (
    ShardDigests,
    check_digests,
    local_digests,
    summed,
)
from shared.weights.local_patches import LocalPatch, apply_blocks, resolve
from shared.weights.local_tensors import write_whole
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


def _shapes(shape: Qwen3Shape, choices: EngineChoices) -> dict[str, tuple[int, ...]]:
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


def _state(shape: Qwen3Shape, choices: EngineChoices, seed: int = 0) -> State:
    g = torch.Generator().manual_seed(seed)
    shapes = _shapes(shape, choices)
    return {name: torch.randn(s, generator=g).to(BF16) for name, s in shapes.items()}


def _next(state: State, seed: int, share: float = 0.1) -> State:
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


def _sharded(
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
            _sharded(state, self.shape, self.choices, rank, self.num_ranks)
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


def _published(state: State) -> dict[str, int]:
    return {name: tensor_digest(tensor) for name, tensor in state.items()}


def _gained(old: State, new: State) -> dict[str, int]:
    before = _published(old)
    return {name: (after - before[name]) & MASK for name, after in _published(new).items()}


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("model", MODELS)
def test_patched_shards_are_the_shards_of_the_new_state_and_back(
    model: str, num_ranks: int
) -> None:
    shape, choices = MODELS[model]
    old = _state(shape, choices)
    new = _next(old, 1)
    ranks = Ranks(old, num_ranks, shape, choices)
    check_cover(ranks.layouts, specs(old))
    check_digests(ranks.digests(), _published(old))

    patches = ranks.resolve(encode(old, new))
    gained = ranks.apply(patches)
    assert ranks.hold(new)
    check_digests(gained, _gained(old, new))
    check_digests(ranks.digests(), _published(new))

    check_digests(ranks.apply(patches, reverse=True), _gained(new, old))
    assert ranks.hold(old)


@pytest.mark.parametrize("model", ["dense", "experts"])
def test_loading_whole_tensors_is_sharding_the_state(model: str) -> None:
    shape, choices = MODELS[model]
    state = _state(shape, choices)
    ranks = Ranks(state, 4, shape, choices)
    for local, layout in zip(ranks.locals, ranks.layouts, strict=True):
        for tensor in local.values():
            tensor.zero_()
        write_whole(local, layout, state)
    assert ranks.hold(state)


def test_a_chain_of_fifty_versions_goes_forward_and_back_on_all_ranks() -> None:
    versions = [_state(DENSE, EngineChoices())]
    for seed in range(50):
        versions.append(_next(versions[-1], seed, share=0.02))
    ranks = Ranks(versions[0], 4)
    digests = [_published(version) for version in versions]
    chain = []
    for number in range(50):
        patches = ranks.resolve(encode(versions[number], versions[number + 1]))
        chain.append(patches)
        ranks.apply(patches)
        assert summed(ranks.digests()) == digests[number + 1]
    assert ranks.hold(versions[50])
    for number in reversed(range(50)):
        ranks.apply(chain[number], reverse=True)
        assert summed(ranks.digests()) == digests[number]
    assert ranks.hold(versions[0])


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from(sorted(MODELS)), st.sampled_from([1, 2, 4, 8]), st.integers(0, 2**32), st.data()
)
def test_any_walk_along_a_chain_ends_where_its_version_is(
    model: str, num_ranks: int, seed: int, data: st.DataObject
) -> None:
    shape, choices = MODELS[model]
    versions = [_state(shape, choices, seed)]
    for step in range(3):
        versions.append(_next(versions[-1], seed + step))
    ranks = Ranks(versions[0], num_ranks, shape, choices)
    chain = [ranks.resolve(encode(a, b)) for a, b in zip(versions, versions[1:], strict=False)]
    at = 0
    for wanted in data.draw(st.lists(st.integers(0, 3), max_size=4)):
        while at != wanted:
            forward = wanted > at
            ranks.apply(chain[at if forward else at - 1], reverse=not forward)
            at += 1 if forward else -1
        assert ranks.hold(versions[at])


def test_key_value_copies_are_counted_once_and_compared_on_every_rank() -> None:
    state = _state(DENSE, EngineChoices())
    ranks = Ranks(state, 8)  # 2 key-value heads: ranks 0..3 hold the first one
    shards = ranks.digests()
    name = "model.layers.0.self_attn.k_proj.weight"
    holders = [rank for rank, shard in enumerate(shards) if name in shard.by_source()]
    assert holders == [0, 4]
    assert combined(shards[rank].by_source()[name] for rank in holders) == tensor_digest(
        state[name]
    )
    ranks.locals[6]["model.layers.0.self_attn.qkv_proj.weight"].view(torch.int16)[5, 0] ^= 1
    with pytest.raises(
        Corrupt,
        match=r"copy of model.layers.0.self_attn.k_proj.weight\[4:8, 0:6\] in "
        r"'model.layers.0.self_attn.qkv_proj.weight' on rank 6",
    ):
        check_digests(ranks.digests(), _published(state))


def test_any_flipped_bit_on_any_rank_is_caught_by_name() -> None:
    state = _state(DENSE, EngineChoices())
    ranks = Ranks(state, 2)
    rng = np.random.default_rng(0)
    for rank, local in enumerate(ranks.locals):
        for name, tensor in local.items():
            bits = tensor.view(torch.int16).view(-1)
            at = int(rng.integers(min(len(bits), 36)))  # rows from 6 on are padding on rank 1
            bits[at] ^= 1 << int(rng.integers(15))
            with pytest.raises(Corrupt, match=r"weight") as error:
                check_digests(ranks.digests(), _published(state))
            sources = {p.source for p in ranks.layouts[rank].tensors[name].placements}
            assert any(source in str(error.value) for source in sources)
            ranks.locals[rank][name].copy_(ranks.sharded(state)[rank][name])
    check_digests(ranks.digests(), _published(state))


def test_queries_and_keys_in_the_wrong_order_are_caught() -> None:
    shape = replace(DENSE, num_kv_heads=DENSE.num_heads)
    state = _state(shape, EngineChoices())
    ranks = Ranks(state, 2, shape)
    qkv = ranks.locals[1]["model.layers.1.self_attn.qkv_proj.weight"]
    q, k, v = qkv.clone().chunk(3)
    qkv.copy_(torch.cat([k, q, v]))
    with pytest.raises(Corrupt, match=r"model.layers.1.self_attn.k_proj.weight"):
        check_digests(ranks.digests(), _published(state))


def test_swapped_halves_of_the_experts_are_caught() -> None:
    """Some of vLLM's kernels keep [up; gate]: such an engine must say `gate_first=False`."""
    state = _state(MOE, EngineChoices())
    ranks = Ranks(state, 2, MOE)
    swapped = replace(ranks.choices, gate_first=False)
    ranks.layouts = [qwen3_layout(MOE, rank, 2, swapped) for rank in range(2)]
    with pytest.raises(Corrupt, match=r"mlp.experts.0.gate_proj.weight"):
        check_digests(ranks.digests(), _published(state))


@pytest.mark.parametrize("name", ["o_proj", "qkv_proj"])
def test_the_shard_of_a_neighbour_is_caught(name: str) -> None:
    state = _state(DENSE, EngineChoices())
    ranks = Ranks(state, 4)
    full = f"model.layers.0.self_attn.{name}.weight"
    ranks.locals[1][full].copy_(ranks.locals[2][full])
    with pytest.raises(Corrupt, match=r"model.layers.0.self_attn"):
        check_digests(ranks.digests(), _published(state))
    ranks = Ranks(state, 4)
    ranks.locals[1], ranks.locals[2] = ranks.locals[2], ranks.locals[1]
    with pytest.raises(Corrupt):
        check_digests(ranks.digests(), _published(state))


def test_a_wrong_old_element_shows_in_what_the_digest_gained() -> None:
    old = _state(DENSE, EngineChoices())
    new = _next(old, 1, share=1.0)
    ranks = Ranks(old, 2)
    patches = ranks.resolve(encode(old, new))
    changed = next(c for c in patches[1].changes if "o_proj" in c.local)
    flat = ranks.locals[1][changed.local].view(torch.int16).view(-1)
    flat[int(changed.positions[0])] ^= 4
    with pytest.raises(Corrupt, match="o_proj"):
        check_digests(ranks.apply(patches), _gained(old, new))


def test_padding_of_the_vocabulary_is_never_touched() -> None:
    old = _state(DENSE, EngineChoices())
    new = _next(old, 1, share=1.0)
    ranks = Ranks(old, 8)  # 128 padded rows, 16 each: rank 4 holds 6 rows, rank 5 only padding
    ranks.locals[4]["model.embed_tokens.weight"][6:] = 7
    ranks.locals[5]["model.embed_tokens.weight"][:] = 7
    check_digests(ranks.apply(ranks.resolve(encode(old, new))), _gained(old, new))
    assert (ranks.locals[4]["model.embed_tokens.weight"][6:] == 7).all()
    assert (ranks.locals[5]["model.embed_tokens.weight"] == 7).all()
    check_digests(ranks.digests(), _published(new))


def test_a_tied_head_published_under_both_names_is_changed_once() -> None:
    old = _state(DENSE, EngineChoices())
    new = _next(old, 4, share=0.5)
    for state in (old, new):
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    choices = EngineChoices(head_published=True)
    embed = {"lm_head.weight"}
    ranks = Ranks({k: v for k, v in old.items() if k not in embed}, 2, DENSE, choices)
    check_cover(ranks.layouts, specs(old))
    gained = ranks.apply(ranks.resolve(encode(old, new)))
    check_digests(gained, _gained(old, new))
    assert ranks.hold({k: v for k, v in new.items() if k not in embed})
    torn = new | {"lm_head.weight": old["lm_head.weight"]}
    with pytest.raises(Corrupt, match="lm_head"):
        check_digests(ranks.digests(), _published(torn))


def test_a_tied_head_that_the_engine_keeps_apart_is_changed_twice() -> None:
    embed = Source("embed", (5, 4))
    layout = Layout({"embed": replicate(embed, 0), "head": tied_copy(replicate(embed, 0))})
    old, new = torch.randn(5, 4).to(BF16), torch.randn(5, 4).to(BF16)
    patch = resolve(DeltaReader(BytesSource(encode({"embed": old}, {"embed": new}))), layout)
    local = {"embed": old.clone(), "head": old.clone()}
    expected = _gained({"embed": old}, {"embed": new})
    check_digests([patch.apply(local)], expected)
    assert same_bits(local["embed"], new)
    assert same_bits(local["head"], new)
    local["head"].copy_(old)  # an engine that forgot its second copy
    with pytest.raises(Corrupt, match=r"copy of embed\[0:5, 0:4\] in 'head' on rank 0"):
        check_digests([local_digests(local, layout)], {"embed": tensor_digest(new)})
    with pytest.raises(ValueError, match="'embed' and 'head' share memory"):
        patch.apply({"embed": local["embed"], "head": local["embed"]})


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.float16, torch.uint8, torch.float8_e4m3fn, torch.bool],
)
def test_steps_wrap_around_in_every_width(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    width = dtype.itemsize
    values = torch.randint(0, 2 if dtype == torch.bool else 256, (2, 60 * width), generator=g)
    old, new = values.to(torch.uint8).view(dtype)
    layout = Layout({"w": replicate(Source("w", (60,)), 0)})
    patch = resolve(DeltaReader(BytesSource(encode({"w": old}, {"w": new}))), layout)
    local = {"w": old.clone()}
    gained = patch.apply(local).by_source()["w"]
    assert same_bits(local["w"], new)
    assert gained == (tensor_digest(new) - tensor_digest(old)) & MASK
    assert summed([local_digests(local, layout)])["w"] == tensor_digest(new)
    patch.apply(local, reverse=True)
    assert same_bits(local["w"], old)


def test_tensors_with_strides_are_patched_where_they_lie() -> None:
    source = Source("w", (6, 10))
    layout = Layout({"w": box(source, (1, 2), (4, 8))})
    old, new = torch.randn(6, 10), torch.randn(6, 10)
    patch = resolve(DeltaReader(BytesSource(encode({"w": old}, {"w": new}))), layout)
    for local in (
        torch.zeros(8, 4).t(),
        torch.zeros(4, 16)[:, ::2],
        torch.zeros(9, 12)[3:7, 2:10],
    ):
        around = local._base if local._base is not None else local
        local.copy_(old[1:5, 2:10])
        others = around.clone()
        patch.apply({"w": local})
        assert same_bits(local, new[1:5, 2:10])
        patch.apply({"w": local}, reverse=True)
        assert same_bits(around, others)


def test_parameters_and_inference_tensors_are_patched_in_place() -> None:
    old, new = torch.randn(7), torch.randn(7)
    layout = Layout({"w": replicate(Source("w", (7,)), 0)})
    patch = resolve(DeltaReader(BytesSource(encode({"w": old}, {"w": new}))), layout)
    parameter = torch.nn.Parameter(old.clone())
    with torch.inference_mode():
        inference = old.clone()
    for tensor in (parameter, inference):
        patch.apply({"w": tensor})
        assert same_bits(tensor.detach(), new)


def test_casts_are_refused_before_anything_is_written_and_replaced_as_a_whole() -> None:
    old = _state(DENSE, EngineChoices())
    new = _next(old, 1)
    layout = qwen3_layout(DENSE, 0, 1)
    patch = resolve(DeltaReader(BytesSource(encode(old, new))), layout)
    local = _sharded(old, DENSE, EngineChoices(), 0, 1)
    last = "model.norm.weight"
    local[last] = local[last].float()
    with pytest.raises(ValueError, match=f"{last}' is F32, its source .* published as BF16"):
        patch.apply(local)
    expected = _sharded(old, DENSE, EngineChoices(), 0, 1)
    expected[last] = expected[last].float()
    assert all(same_bits(local[name], expected[name]) for name in local)

    fp32 = {name: tensor.float() for name, tensor in local.items()}
    write_whole(fp32, layout, new)
    finite = {n: t.float() for n, t in new.items()}
    assert summed([local_digests(fp32, layout)]) == _published(finite)


def test_deltas_of_another_model_are_refused_with_both_sides() -> None:
    old = _state(DENSE, EngineChoices())
    new = _next(old, 1)
    fewer = {name: tensor for name, tensor in old.items() if name != "model.norm.weight"}
    with pytest.raises(WrongBase, match=r"'model.norm.weight'.*no such tensor.*\[6\]"):
        Ranks(old, 2).resolve(encode(fewer, {name: new[name] for name in fewer}))
    wider = replace(DENSE, vocab_size=71)
    ranks = Ranks(_state(wider, EngineChoices()), 2, wider)
    with pytest.raises(WrongBase, match=r"embed_tokens.*\[70, 6\].*\[71, 6\]"):
        ranks.resolve(encode(old, new))


def test_blocks_applied_one_by_one_end_like_the_resolved_patch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With blocks, chunks of writing and chunks of hashing all cut in odd places."""
    monkeypatch.setattr("shared.weights.blocks.BLOCK_ELEMENTS", 37)
    monkeypatch.setattr(local_patches_module, "CHUNK", 5)
    monkeypatch.setattr(local_digests_module, "CHUNK", 7)
    old = _state(DENSE, EngineChoices())
    new = _next(old, 1)
    delta = encode(old, new)
    reader = DeltaReader(BytesSource(delta))
    assert len({b.tensor_index for b in reader.blocks()}) < len(list(reader.blocks()))
    ranks = Ranks(old, 2)
    whole = Ranks(old, 2).apply(ranks.resolve(delta))
    parts = [
        apply_blocks(reader, layout, local)
        for layout, local in zip(ranks.layouts, ranks.locals, strict=True)
    ]
    assert parts == whole
    assert ranks.hold(new)
    check_digests(ranks.digests(), _published(new))


def test_blocks_of_other_ranks_are_not_even_decompressed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.weights.blocks.BLOCK_ELEMENTS", 10)
    reader = DeltaReader(BytesSource(encode({"w": torch.zeros(40, 2)}, {"w": torch.ones(40, 2)})))
    read: list[int] = []
    coded = Block.coded

    def counted(block: Block) -> Any:
        read.append(block.start)
        return coded(block)

    monkeypatch.setattr(Block, "coded", counted)
    resolve(reader, Layout({"w": box(Source("w", (40, 2)), (18, 0), (10, 2))}))
    assert read == [30, 40, 50]


def test_the_version_label_is_void_while_writing_and_after_a_failed_write() -> None:
    version = DeviceVersion()
    assert version.label is None
    with version.writing(3):
        assert version.label is None
    assert version.label == 3
    with pytest.raises(ValueError, match="version 5: another version is being written"):
        with version.writing(4), version.writing(5):
            pass
    assert version.label is None

    old = _state(DENSE, EngineChoices())
    ranks = Ranks(old, 1)
    patch = ranks.resolve(encode(old, _next(old, 1)))[0]
    broken = patch.changes[-1]
    outside = broken._replace(positions=broken.positions + 10**6)
    torn = LocalPatch(patch.layout, patch.dtypes, (*patch.changes[:-1], outside))
    with version.writing(6):
        pass
    with pytest.raises(IndexError), version.writing(7):
        torn.apply(ranks.locals[0])
    assert version.label is None
    assert not ranks.hold(old)
    with version.writing(6):
        write_whole(ranks.locals[0], ranks.layouts[0], old)
        check_digests(ranks.digests(), _published(old))
    assert version.label == 6


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


def test_models_that_do_not_divide_among_the_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match="8 heads and 2 key-value heads .* among 3 ranks"):
        qwen3_layout(DENSE, 0, 3)
    with pytest.raises(ValueError, match="8 heads and 3 key-value heads .* among 2 ranks"):
        qwen3_layout(replace(DENSE, num_kv_heads=3), 0, 2)
    few = replace(MOE, num_experts=3)
    with pytest.raises(ValueError, match="rank 3 of 4 holds none of 3 experts"):
        qwen3_layout(few, 3, 4, WHOLE_EXPERTS)


def test_the_digest_on_the_device_is_the_digest_of_the_host() -> None:
    rng = np.random.default_rng(0)
    positions = rng.integers(0, 2**40, 1000)
    for code in ("u1", "u2", "u4", "u8"):
        bits = rng.integers(0, 2 ** (8 * int(code[1])), 1000, dtype=np.uint64).astype(code)
        found = local_digests_module.contributions(
            torch.from_numpy(positions), torch.from_numpy(bits.view(f"i{code[1]}"))
        )
        assert int(found) & MASK == contributions(positions, bits)
