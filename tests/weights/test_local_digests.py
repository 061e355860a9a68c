"""Sums of shards against the published digests, and every wrong device copy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from shared.weights import local_digests as local_digests_module
from shared.weights.deltas import encode
from shared.weights.digests import MASK, combined, contributions, tensor_digest
from shared.weights.errors import Corrupt
from shared.weights.local_digests import check_digests
from shared.weights.qwen3_layout import EngineChoices, qwen3_layout
from tests.weights.qwen3_shards import (
    DENSE,
    MOE,
    Ranks,
    gain_of,
    make_state,
    next_state,
    published,
)


def test_key_value_copies_are_counted_once_and_compared_on_every_rank() -> None:
    state = make_state(DENSE, EngineChoices())
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
        check_digests(ranks.digests(), published(state))


def test_any_flipped_bit_on_any_rank_is_caught_by_name() -> None:
    state = make_state(DENSE, EngineChoices())
    ranks = Ranks(state, 2)
    rng = np.random.default_rng(0)
    for rank, local in enumerate(ranks.locals):
        for name, tensor in local.items():
            bits = tensor.view(torch.int16).view(-1)
            at = int(rng.integers(min(len(bits), 36)))  # rows from 6 on are padding on rank 1
            bits[at] ^= 1 << int(rng.integers(15))
            with pytest.raises(Corrupt, match=r"weight") as error:
                check_digests(ranks.digests(), published(state))
            sources = {p.source for p in ranks.layouts[rank].tensors[name].placements}
            assert any(source in str(error.value) for source in sources)
            ranks.locals[rank][name].copy_(ranks.sharded(state)[rank][name])
    check_digests(ranks.digests(), published(state))


def test_queries_and_keys_in_the_wrong_order_are_caught() -> None:
    shape = replace(DENSE, num_kv_heads=DENSE.num_heads)
    state = make_state(shape, EngineChoices())
    ranks = Ranks(state, 2, shape)
    qkv = ranks.locals[1]["model.layers.1.self_attn.qkv_proj.weight"]
    q, k, v = qkv.clone().chunk(3)
    qkv.copy_(torch.cat([k, q, v]))
    with pytest.raises(Corrupt, match=r"model.layers.1.self_attn.k_proj.weight"):
        check_digests(ranks.digests(), published(state))


def test_swapped_halves_of_the_experts_are_caught() -> None:
    """Some of vLLM's kernels keep [up; gate]: such an engine must say `gate_first=False`."""
    state = make_state(MOE, EngineChoices())
    ranks = Ranks(state, 2, MOE)
    swapped = replace(ranks.choices, gate_first=False)
    ranks.layouts = [qwen3_layout(MOE, rank, 2, swapped) for rank in range(2)]
    with pytest.raises(Corrupt, match=r"mlp.experts.0.gate_proj.weight"):
        check_digests(ranks.digests(), published(state))


@pytest.mark.parametrize("name", ["o_proj", "qkv_proj"])
def test_the_shard_of_a_neighbour_is_caught(name: str) -> None:
    state = make_state(DENSE, EngineChoices())
    ranks = Ranks(state, 4)
    full = f"model.layers.0.self_attn.{name}.weight"
    ranks.locals[1][full].copy_(ranks.locals[2][full])
    with pytest.raises(Corrupt, match=r"model.layers.0.self_attn"):
        check_digests(ranks.digests(), published(state))
    ranks = Ranks(state, 4)
    ranks.locals[1], ranks.locals[2] = ranks.locals[2], ranks.locals[1]
    with pytest.raises(Corrupt):
        check_digests(ranks.digests(), published(state))


def test_a_wrong_old_element_shows_in_what_the_digest_gained() -> None:
    old = make_state(DENSE, EngineChoices())
    new = next_state(old, 1, share=1.0)
    ranks = Ranks(old, 2)
    patches = ranks.resolve(encode(old, new))
    changed = next(c for c in patches[1].changes if "o_proj" in c.local)
    flat = ranks.locals[1][changed.local].view(torch.int16).view(-1)
    flat[int(changed.positions[0])] ^= 4
    with pytest.raises(Corrupt, match="o_proj"):
        check_digests(ranks.apply(patches), gain_of(old, new))


@pytest.mark.parametrize("fault", ["lost", "wrong order", "doubled", "taken back twice"])
def test_a_patch_lost_or_applied_out_of_turn_shows_in_the_device_copy(fault: str) -> None:
    """Steps add up in any order: what tells is the digest after each patch."""
    states = [make_state(DENSE, EngineChoices())]
    for seed in (1, 2):
        states.append(next_state(states[-1], seed))
    ranks = Ranks(states[0], 2)
    patches = [ranks.resolve(encode(*states[i : i + 2])) for i in range(2)]
    if fault in ("lost", "wrong order"):
        ranks.apply(patches[1])
        with pytest.raises(Corrupt, match="device copy"):
            check_digests(ranks.digests(), published(states[2]))
        ranks.apply(patches[0])  # late, but nothing is missing now
    else:
        ranks.apply(patches[0])
        check_digests(ranks.digests(), published(states[1]))
        back = fault == "taken back twice"
        ranks.apply(patches[0], reverse=back)
        if back:
            ranks.apply(patches[0], reverse=True)
        with pytest.raises(Corrupt, match="device copy"):
            check_digests(ranks.digests(), published(states[0 if back else 1]))
        for _ in range(2 if back else 1):
            ranks.apply(patches[0], reverse=not back)
        ranks.apply(patches[1])
    check_digests(ranks.digests(), published(states[2]))
    assert ranks.hold(states[2])


def test_the_digest_on_the_device_is_the_digest_of_the_host() -> None:
    rng = np.random.default_rng(0)
    positions = rng.integers(0, 2**40, 1000)
    for code in ("u1", "u2", "u4", "u8"):
        bits = rng.integers(0, 2 ** (8 * int(code[1])), 1000, dtype=np.uint64).astype(code)
        found = local_digests_module.contributions(
            torch.from_numpy(positions), torch.from_numpy(bits.view(f"i{code[1]}"))
        )
        assert int(found) & MASK == contributions(positions, bits)
