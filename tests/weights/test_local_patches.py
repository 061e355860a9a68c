"""Deltas through layouts, against sharding the new state."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.weights import local_digests as local_digests_module
from shared.weights import local_patches as local_patches_module
from shared.weights.bits import same_bits
from shared.weights.deltas import Block, BytesSource, DeltaReader, encode
from shared.weights.device_version import DeviceVersion
from shared.weights.digests import MASK, specs, tensor_digest
from shared.weights.errors import Corrupt, WrongBase
from shared.weights.layout_parts import Source, box, replicate, tied_copy
from shared.weights.layouts import Layout, check_cover
from shared.weights.local_digests import check_digests, local_digests, summed
from shared.weights.local_patches import LocalPatch, apply_blocks, resolve
from shared.weights.local_tensors import write_whole
from shared.weights.qwen3_layout import EngineChoices, qwen3_layout
from tests.weights.qwen3_shards import (
    BF16,
    DENSE,
    MODELS,
    Ranks,
    gain_of,
    make_state,
    next_state,
    published,
    sharded,
)


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("model", MODELS)
def test_patched_shards_are_the_shards_of_the_new_state_and_back(
    model: str, num_ranks: int
) -> None:
    shape, choices = MODELS[model]
    old = make_state(shape, choices)
    new = next_state(old, 1)
    ranks = Ranks(old, num_ranks, shape, choices)
    check_cover(ranks.layouts, specs(old))
    check_digests(ranks.digests(), published(old))

    patches = ranks.resolve(encode(old, new))
    gained = ranks.apply(patches)
    assert ranks.hold(new)
    check_digests(gained, gain_of(old, new))
    check_digests(ranks.digests(), published(new))

    check_digests(ranks.apply(patches, reverse=True), gain_of(new, old))
    assert ranks.hold(old)


@pytest.mark.parametrize("model", ["dense", "experts"])
def test_loading_whole_tensors_is_sharding_the_state(model: str) -> None:
    shape, choices = MODELS[model]
    state = make_state(shape, choices)
    ranks = Ranks(state, 4, shape, choices)
    for local, layout in zip(ranks.locals, ranks.layouts, strict=True):
        for tensor in local.values():
            tensor.zero_()
        write_whole(local, layout, state)
    assert ranks.hold(state)


def test_a_chain_of_fifty_versions_goes_forward_and_back_on_all_ranks() -> None:
    versions = [make_state(DENSE, EngineChoices())]
    for seed in range(50):
        versions.append(next_state(versions[-1], seed, share=0.02))
    ranks = Ranks(versions[0], 4)
    digests = [published(version) for version in versions]
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
    versions = [make_state(shape, choices, seed)]
    for step in range(3):
        versions.append(next_state(versions[-1], seed + step))
    ranks = Ranks(versions[0], num_ranks, shape, choices)
    chain = [ranks.resolve(encode(a, b)) for a, b in itertools.pairwise(versions)]
    at = 0
    for wanted in data.draw(st.lists(st.integers(0, 3), max_size=4)):
        while at != wanted:
            forward = wanted > at
            ranks.apply(chain[at if forward else at - 1], reverse=not forward)
            at += 1 if forward else -1
        assert ranks.hold(versions[at])


def test_padding_of_the_vocabulary_is_never_touched() -> None:
    old = make_state(DENSE, EngineChoices())
    new = next_state(old, 1, share=1.0)
    ranks = Ranks(old, 8)  # 128 padded rows, 16 each: rank 4 holds 6 rows, rank 5 only padding
    ranks.locals[4]["model.embed_tokens.weight"][6:] = 7
    ranks.locals[5]["model.embed_tokens.weight"][:] = 7
    check_digests(ranks.apply(ranks.resolve(encode(old, new))), gain_of(old, new))
    assert (ranks.locals[4]["model.embed_tokens.weight"][6:] == 7).all()
    assert (ranks.locals[5]["model.embed_tokens.weight"] == 7).all()
    check_digests(ranks.digests(), published(new))


def test_a_tied_head_published_under_both_names_is_changed_once() -> None:
    old = make_state(DENSE, EngineChoices())
    new = next_state(old, 4, share=0.5)
    for state in (old, new):
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    choices = EngineChoices(head_published=True)
    embed = {"lm_head.weight"}
    ranks = Ranks({k: v for k, v in old.items() if k not in embed}, 2, DENSE, choices)
    check_cover(ranks.layouts, specs(old))
    gained = ranks.apply(ranks.resolve(encode(old, new)))
    check_digests(gained, gain_of(old, new))
    assert ranks.hold({k: v for k, v in new.items() if k not in embed})
    torn = new | {"lm_head.weight": old["lm_head.weight"]}
    with pytest.raises(Corrupt, match="lm_head"):
        check_digests(ranks.digests(), published(torn))


def test_a_tied_head_that_the_engine_keeps_apart_is_changed_twice() -> None:
    embed = Source("embed", (5, 4))
    layout = Layout({"embed": replicate(embed, 0), "head": tied_copy(replicate(embed, 0))})
    old, new = torch.randn(5, 4).to(BF16), torch.randn(5, 4).to(BF16)
    patch = resolve(DeltaReader(BytesSource(encode({"embed": old}, {"embed": new}))), layout)
    local = {"embed": old.clone(), "head": old.clone()}
    expected = gain_of({"embed": old}, {"embed": new})
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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")
def test_an_accelerator_does_what_the_cpu_does() -> None:
    old = make_state(DENSE, EngineChoices())
    new = next_state(old, 1)
    ranks = Ranks(old, 2)
    on_cpu = ranks.locals
    ranks.locals = [{name: t.cuda() for name, t in local.items()} for local in on_cpu]
    patches = [patch.to(torch.device("cuda")) for patch in ranks.resolve(encode(old, new))]
    check_digests(ranks.apply(patches), gain_of(old, new))
    check_digests(ranks.digests(), published(new))
    ranks.locals = [{name: t.cpu() for name, t in local.items()} for local in ranks.locals]
    assert ranks.hold(new)


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
    old = make_state(DENSE, EngineChoices())
    new = next_state(old, 1)
    layout = qwen3_layout(DENSE, 0, 1)
    patch = resolve(DeltaReader(BytesSource(encode(old, new))), layout)
    local = sharded(old, DENSE, EngineChoices(), 0, 1)
    last = "model.norm.weight"
    local[last] = local[last].float()
    with pytest.raises(ValueError, match=f"{last}' is F32, its source .* published as BF16"):
        patch.apply(local)
    expected = sharded(old, DENSE, EngineChoices(), 0, 1)
    expected[last] = expected[last].float()
    assert all(same_bits(local[name], expected[name]) for name in local)

    fp32 = {name: tensor.float() for name, tensor in local.items()}
    write_whole(fp32, layout, new)
    finite = {n: t.float() for n, t in new.items()}
    assert summed([local_digests(fp32, layout)]) == published(finite)


def test_deltas_of_another_model_are_refused_with_both_sides() -> None:
    old = make_state(DENSE, EngineChoices())
    new = next_state(old, 1)
    fewer = {name: tensor for name, tensor in old.items() if name != "model.norm.weight"}
    with pytest.raises(WrongBase, match=r"'model.norm.weight'.*no such tensor.*\[6\]"):
        Ranks(old, 2).resolve(encode(fewer, {name: new[name] for name in fewer}))
    wider = replace(DENSE, vocab_size=71)
    ranks = Ranks(make_state(wider, EngineChoices()), 2, wider)
    with pytest.raises(WrongBase, match=r"embed_tokens.*\[70, 6\].*\[71, 6\]"):
        ranks.resolve(encode(old, new))


def test_blocks_applied_one_by_one_end_like_the_resolved_patch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With blocks, chunks of writing and chunks of hashing all cut in odd places."""
    monkeypatch.setattr("shared.weights.blocks.BLOCK_ELEMENTS", 37)
    monkeypatch.setattr(local_patches_module, "CHUNK", 5)
    monkeypatch.setattr(local_digests_module, "CPU_CHUNK", 7)
    old = make_state(DENSE, EngineChoices())
    new = next_state(old, 1)
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
    check_digests(ranks.digests(), published(new))


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
    another = pytest.raises(ValueError, match="version 5: another version is being written")
    with another, version.writing(4), version.writing(5):
        pass
    assert version.label is None

    old = make_state(DENSE, EngineChoices())
    ranks = Ranks(old, 1)
    patch = ranks.resolve(encode(old, next_state(old, 1)))[0]
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
        check_digests(ranks.digests(), published(old))
    assert version.label == 6
