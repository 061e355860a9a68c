"""Layouts as descriptions: where each element lies, what is refused, what covers a version."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.weights.deltas import BytesSource, DeltaReader, encode
from shared.weights.digests import contributions, specs
from shared.weights.layout_parts import (
    Share,
    Source,
    box,
    fuse,
    pad,
    replicate,
    shard_columns,
    shard_rows,
    shard_vocabulary,
    share_of,
    stack,
    tied_copy,
    tied_name,
)
from shared.weights.layouts import Layout, LocalTensor, Placement, check_cover
from shared.weights.local_digests import local_digests
from shared.weights.local_patches import resolve
from shared.weights.local_tensors import check_local, write_whole

R = Source("rows", (8, 6))


@st.composite
def placements(draw: st.DrawFn) -> tuple[Placement, tuple[int, ...]]:
    """Any box of any source of up to three dimensions, anywhere in a local tensor of up to four."""
    num_dims = draw(st.integers(0, 3))
    num_local = draw(st.integers(num_dims, 4))
    shape = tuple(draw(st.integers(0, 5)) for _ in range(num_dims))
    is_whole = [draw(st.booleans()) for _ in shape]
    start = tuple(
        0 if whole else draw(st.integers(0, n)) for n, whole in zip(shape, is_whole, strict=True)
    )
    size = tuple(
        n if whole else draw(st.integers(0, n - a))
        for n, a, whole in zip(shape, start, is_whole, strict=True)
    )
    dims = tuple(draw(st.permutations(range(num_local)))[:num_dims])
    step = tuple(draw(st.integers(1, 3)) for _ in range(num_dims))
    offset = tuple(draw(st.integers(0, 2)) for _ in range(num_local))
    local = [a + 1 for a in offset]
    for dim, n, s in zip(dims, size, step, strict=True):
        local[dim] = offset[dim] + max(0, n - 1) * s + 1 + draw(st.integers(0, 2))
    return Placement("x", shape, start, size, dims, offset, step), tuple(local)


def _pairs(placement: Placement) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(source index, local index) of every element, by the words of the docstring."""
    pairs = []
    for index in itertools.product(*(range(n) for n in placement.size)):
        local = list(placement.offset)
        for d, i in enumerate(index):
            local[placement.dims[d]] += i * placement.step[d]
        source = tuple(a + i for a, i in zip(placement.start, index, strict=True))
        pairs.append((source, tuple(local)))
    return pairs


@settings(max_examples=150)
@given(placements(), st.integers(0, 2**32 - 1))
def test_any_box_is_written_patched_and_digested_element_by_element(
    drawn: tuple[Placement, tuple[int, ...]], seed: int
) -> None:
    placement, local_shape = drawn
    layout = Layout({"here": LocalTensor(local_shape, (placement,))})
    rng = np.random.default_rng(seed)
    shape = placement.source_shape
    old = torch.tensor(rng.integers(-(2**15), 2**15, shape), dtype=torch.int16)
    changed = torch.tensor(rng.random(shape) < 0.4)
    other = torch.tensor(rng.integers(-(2**15), 2**15, shape), dtype=torch.int16)
    new = torch.where(changed, other, old)
    local = {"here": torch.full(local_shape, -7, dtype=torch.int16)}
    write_whole(local, layout, {"x": old})

    expected = torch.full(local_shape, -7, dtype=torch.int16)
    for source, here in _pairs(placement):
        expected[here] = old[source]
    assert torch.equal(local["here"], expected)

    delta = encode({"x": old, "z": torch.zeros(1)}, {"x": new, "z": torch.ones(1)})
    patch = resolve(DeltaReader(BytesSource(delta)), layout)
    before = local_digests(local, layout).by_source()["x"]
    change = patch.apply(local).by_source().get("x", 0)
    for source, here in _pairs(placement):
        expected[here] = new[source]
    assert torch.equal(local["here"], expected)

    flat = [int(np.ravel_multi_index(s, placement.source_shape)) for s, _ in _pairs(placement)]
    bits = np.array([int(new[s]) for s, _ in _pairs(placement)], np.int16).view(np.uint16)
    after = local_digests(local, layout).by_source()["x"]
    assert after == contributions(np.array(flat, np.int64), bits)
    assert (before + change) % 2**64 == after


def _at(*, start: Any = (0, 0), size: Any = (2, 6), offset: Any = (0, 0), **other: Any) -> Any:
    fields: dict[str, Any] = {"dims": (0, 1), "step": (1, 1), "source_shape": R.shape} | other
    return Placement(source="rows", start=start, size=size, offset=offset, **fields)


@pytest.mark.parametrize(
    ("placements", "words"),
    [
        ([_at(start=(7, 0))], r"rows\[7:9, 0:6\]: reaches beyond the shape \[8, 6\]"),
        ([_at(offset=(3, 0))], r"rows\[0:2, 0:6\]: lies outside the local shape \[4, 6\]"),
        ([_at(step=(4, 1))], "lies outside the local shape"),
        ([_at(offset=(-1, 0))], "negative"),
        ([_at(step=(0, 1))], "below 1"),
        ([_at(dims=(0, 0))], r"dimensions \[0, 0\]"),
        ([_at(dims=(0, 2))], r"dimensions \[0, 2\]"),
        ([_at(offset=(0,))], "one number per dimension"),
        (
            [_at(), _at(start=(4, 0), offset=(1, 0))],
            r"rows\[0:2, 0:6\] and rows\[4:6, 0:6\] lie over each other",
        ),
        (
            [_at(step=(2, 1)), _at(start=(2, 0), size=(1, 6), offset=(2, 0))],
            "lie over each other",
        ),
        (
            [_at(), _at(source_shape=(9, 6), offset=(2, 0))],
            r"source 'rows' has shape \[9, 6\] here and \[8, 6\] elsewhere",
        ),
    ],
)
def test_impossible_layouts_are_refused_with_both_names(
    placements: list[Placement], words: str
) -> None:
    with pytest.raises(ValueError, match=words) as error:
        Layout({"local": LocalTensor((4, 6), tuple(placements))})
    assert "'local'" in str(error.value)


def test_interleaved_sources_are_not_over_each_other() -> None:
    even = _at(step=(2, 1))
    odd = _at(start=(2, 0), step=(2, 1), offset=(1, 0))
    layout = Layout({"local": LocalTensor((4, 6), (even, odd))})
    state = {"rows": torch.arange(48.0).view(8, 6)}
    local = {"local": torch.zeros(4, 6)}
    write_whole(local, layout, state)
    assert torch.equal(local["local"], state["rows"][[0, 2, 1, 3]])


@settings(max_examples=100)
@given(st.lists(placements(), min_size=2, max_size=4))
def test_boxes_over_each_other_are_refused_and_boxes_of_one_step_only_then(drawn: Any) -> None:
    by_dims: dict[int, list[Placement]] = {}
    for index, (placement, local_shape) in enumerate(drawn):
        named = Placement(f"x{index}", *(getattr(placement, f) for f in _FIELDS))
        by_dims.setdefault(len(local_shape), []).append(named)
    for num_dims, chosen in by_dims.items():
        # Wide enough for all of them, so that only their being apart decides.
        layout = {"here": LocalTensor((20,) * num_dims, tuple(chosen))}
        written = [here for placement in chosen for _, here in _pairs(placement)]
        if len(set(written)) < len(written):
            with pytest.raises(ValueError, match="lie over each other"):
                Layout(layout)
        elif len({placement.step for placement in chosen}) == 1:
            Layout(layout)


_FIELDS = ("source_shape", "start", "size", "dims", "offset", "step")


def test_shares_repeat_over_consecutive_ranks_and_one_of_them_owns() -> None:
    shares = [share_of(rank, 4, copies=2) for rank in range(4)]
    assert shares == [Share(0, 2), Share(0, 2, False), Share(1, 2), Share(1, 2, False)]
    with pytest.raises(ValueError, match="rank 0 of 4 with 3 copies"):
        share_of(0, 4, copies=3)


def test_what_does_not_divide_or_fit_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="'rows': 8 in dimension 0 do not divide by 3"):
        shard_rows(R, Share(0, 3))
    with pytest.raises(ValueError, match="'rows': 6 in dimension 1 do not divide by 4"):
        shard_columns(R, Share(0, 4))
    with pytest.raises(ValueError, match="'rows': 10 padded rows do not divide by 4"):
        shard_vocabulary(R, Share(0, 4), multiple=5)
    with pytest.raises(ValueError, match=r"\[8, 6\], \[8, 3\].* do not fuse along 0"):
        fuse(replicate(R, 0), shard_columns(R, Share(0, 2)))
    with pytest.raises(ValueError, match="do not stack"):
        stack(replicate(R, 0), shard_rows(R, Share(0, 2)))
    with pytest.raises(ValueError, match=r"\[8, 6\] does not fit into \[9, 5\]"):
        pad(replicate(R, 0), (9, 5))


def _by_rows(ranks: int, **changes: LocalTensor) -> list[Layout]:
    tensors = [{"w": shard_rows(R, share_of(rank, ranks))} for rank in range(ranks)]
    return [Layout(t | changes if i == 0 else t) for i, t in enumerate(tensors)]


def test_a_set_of_layouts_must_own_every_published_element_once() -> None:
    published = specs({"rows": torch.zeros(8, 6)})
    check_cover(_by_rows(4), published)
    with pytest.raises(ValueError, match="tensor 'rows': ranks own 36 of 48 elements"):
        check_cover(_by_rows(4)[:3], published)
    twice = _by_rows(2, again=box(R, (2, 0), (4, 6)))
    with pytest.raises(ValueError, match=r"own the same elements: rows\[0:4, 0:6\] and rows\[2:6"):
        check_cover(twice, published)
    stray = _by_rows(2, again=box(R, (2, 0), (4, 6), owned=False))
    with pytest.raises(ValueError, match=r"rank 0 holds a copy of rows\[2:6, 0:6\]"):
        check_cover(stray, published)
    check_cover(_by_rows(2, again=tied_copy(shard_rows(R, Share(1, 2)))), published)


def test_a_set_of_layouts_must_know_exactly_the_published_tensors() -> None:
    with pytest.raises(ValueError, match="'more' is only published"):
        check_cover(_by_rows(2), specs({"rows": torch.zeros(8, 6), "more": torch.zeros(1)}))
    with pytest.raises(ValueError, match="'rows' is only in the layouts"):
        check_cover(_by_rows(2), [])
    with pytest.raises(ValueError, match=r"published \[6, 8\], in the layout of rank 0 \[8, 6\]"):
        check_cover(_by_rows(2), specs({"rows": torch.zeros(6, 8)}))


def test_a_tied_name_is_covered_and_digested_like_the_tensor_itself() -> None:
    layout = Layout({"w": tied_name(replicate(R, 0), "head")})
    weight = torch.randn(8, 6)
    check_cover([layout], specs({"rows": weight, "head": weight}))
    digests = local_digests({"w": weight}, layout).by_source()
    assert digests["rows"] == digests["head"]


def test_tensors_of_another_engine_are_refused_by_name() -> None:
    layout = Layout({"a": replicate(R, 0), "b": replicate(Source("other", (8, 6)), 0)})
    good = {"a": torch.zeros(8, 6), "b": torch.zeros(8, 6)}
    check_local(good, layout)
    with pytest.raises(ValueError, match="'b' is in the layout, the engine has none"):
        check_local({"a": good["a"]}, layout)
    with pytest.raises(ValueError, match=r"'a': layout \[8, 6\], engine \[6, 8\]"):
        check_local(good | {"a": torch.zeros(6, 8)}, layout)
    with pytest.raises(ValueError, match="'a' and 'b' share memory"):
        check_local(good | {"b": good["a"]}, layout)
    with pytest.raises(ValueError, match="'a' is expanded"):
        check_local(good | {"a": torch.zeros(6).expand(8, 6)}, layout)
    with pytest.raises(ValueError, match="'a' is BF16, its source 'rows' is published as F32"):
        check_local(good | {"a": good["a"].bfloat16()}, layout, {"rows": "F32", "other": "F32"})


def test_views_of_one_storage_that_are_apart_are_accepted() -> None:
    fused = torch.zeros(16, 6)
    layout = Layout({"a": replicate(R, 0), "b": replicate(Source("other", (8, 6)), 0)})
    check_local({"a": fused[:8], "b": fused[8:]}, layout)
    with pytest.raises(ValueError, match="share memory"):
        check_local({"a": fused[:8], "b": fused[7:15]}, layout)


def test_whole_tensors_of_another_model_are_refused_before_anything_is_written() -> None:
    layout = Layout({"a": replicate(R, 0), "b": replicate(Source("other", (3,)), 0)})
    local = {"a": torch.zeros(8, 6), "b": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"'other': layout \[3\], published \[4\]"):
        write_whole(local, layout, {"rows": torch.ones(8, 6), "other": torch.ones(4)})
    with pytest.raises(ValueError, match=r"'other': layout \[3\], published nothing"):
        write_whole(local, layout, {"rows": torch.ones(8, 6)})
    assert not local["a"].any()
    write_whole(local, layout, {"rows": torch.ones(8, 6)}, names={"rows"})
    assert local["a"].all()
