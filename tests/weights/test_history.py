from __future__ import annotations

import asyncio
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.weights import deltas
from shared.weights.errors import Corrupt, MissingVersion, WeightsError
from shared.weights.history import WeightHistory
from tests.weights.chains import (
    Chain,
    bits_of,
    manifest_of,
    random_state,
)

# --- exactness


@pytest.mark.parametrize("code", ["BF16", "F32", "F16", "F64", "F8_E4M3"])
async def test_a_chain_of_200_versions_is_exact_forward_backward_and_in_any_order(code) -> None:
    shapes = {"a": (code, (13, 7)), "b": (code, ()), "c": (code, (0,)), "d": ("I64", (3,))}
    chain = Chain(200, seed=len(code), share=None, shapes=shapes)
    history = await chain.history(200)

    async def visit(versions) -> None:
        for version in versions:
            async with history.at(version) as state:
                assert bits_of(state) == chain.bits[version]

    await visit(reversed(range(200)))
    await visit(range(200))
    shuffled = random.Random(1)
    await visit(shuffled.sample(range(200), 12))
    for mark in (30, 31, 150, 198):
        history.evict_below(mark)
        assert history.versions == tuple(range(mark, 200))
        await visit(shuffled.sample(history.versions, min(4, len(history.versions))))
    assert history.faults == 0


@settings(deadline=None, max_examples=6)
@given(
    seed=st.integers(0, 2**32 - 1),
    codes=st.lists(
        st.sampled_from(["BF16", "F32", "F16", "F64", "F8_E5M2"]), min_size=2, max_size=4
    ),
    has_sha256=st.booleans(),
    spool_bytes=st.sampled_from([0, 5000, 1 << 30]),
    visits=st.lists(st.integers(0, 199), min_size=1, max_size=6),
)
def test_any_chain_of_200_versions_is_exact_there_and_back(
    seed, codes, has_sha256, spool_bytes, visits
) -> None:
    shapes = {f"t{i}": (code, (11, i + 1)) for i, code in enumerate(codes)}
    chain = Chain(200, seed=seed, share=None, has_sha256=has_sha256, shapes=shapes)

    async def walk() -> None:
        history = await chain.history(200, spool_bytes=spool_bytes)
        for version in (*reversed(range(200)), *range(200), *visits):
            async with history.at(version) as state:
                assert bits_of(state) == chain.bits[version]
        assert history.faults == 0
        history.clear()
        assert chain.open_spools == 0

    asyncio.run(walk())


_steps = st.lists(
    st.tuples(
        st.sampled_from(
            ["delta", "delta", "delta", "back", "keyframe", "at", "evict", "bad", "clear"]
        ),
        st.integers(0, 14),
    ),
    max_size=40,
)
_CHAIN = Chain(15, seed=5, share=None, has_sha256=True)


@settings(deadline=None, max_examples=60)
@given(steps=_steps, keep_past=st.booleans())
def test_whatever_happens_a_version_is_lent_exactly_or_not_at_all(steps, keep_past) -> None:
    asyncio.run(_walk(_CHAIN, steps, keep_past))


async def _walk(chain: Chain, steps: list[tuple[str, int]], keep_past: bool) -> None:
    history = WeightHistory(keep_past=keep_past, threads=2, spool_bytes=300)
    held: set[int] = set()
    for step, version in steps:
        if step == "delta" and version:
            try:
                await chain.apply(history, version)
            except MissingVersion:
                assert version - 1 not in held
            else:
                assert held & {version, version - 1} or (held and keep_past)  # a way-point
                held = held | {version} if keep_past else {version}
        elif step == "back" and version:
            before = chain.manifests[version - 1]
            try:
                await history.apply_delta(before, version, chain.spool(version))
            except MissingVersion:
                assert version not in held
            else:
                held = held | {version - 1} if keep_past else {version - 1}
        elif step == "keyframe":
            await history.load_keyframe(chain.manifests[version], chain.keyframe(version))
            held = held | {version} if keep_past else {version}
        elif step == "at" and version in held:
            async with history.at(version) as state:
                assert bits_of(state) == chain.bits[version]
            assert history.position == version
        elif step == "at":
            with pytest.raises(MissingVersion):
                async with history.at(version):
                    pytest.fail("lent a version that is not held")
        elif step == "evict":
            dropped = history.evict_below(version)
            assert set(dropped) == {v for v in held if v < version and v != max(held)}
            held -= set(dropped)
        elif step == "bad" and version > 1 and chain.bits[version - 2] != chain.bits[version - 1]:
            with pytest.raises(WeightsError):
                await history.apply_delta(
                    chain.manifests[version].model_copy(update={"version": 99}),
                    version - 2,
                    chain.spool(version),
                )
        elif step == "clear":
            history.clear()
            held = set()
        assert history.versions == tuple(sorted(held))
        assert history.newest == max(held, default=-1)
    await chain.must_hold(history, *held)
    assert history.faults == 0
    history.clear()
    assert (history.versions, history.bytes_held, history.bytes_spilled) == ((), 0, 0)
    assert chain.open_spools == 0
    chain.spools.clear()


async def test_a_miss_raises_and_names_what_is_held() -> None:
    chain = Chain(4)
    history = await chain.history()
    with pytest.raises(MissingVersion, match="none"):
        async with history.at(0):
            pytest.fail("there is nothing")
    assert (history.newest, history.position, history.bytes_held) == (-1, -1, 0)
    history = await chain.history(3)
    with pytest.raises(MissingVersion, match=r"version 3 .*0\.\.2") as caught:
        history.manifest(3)
    assert (caught.value.version, caught.value.held) == (3, (0, 1, 2))
    await chain.must_hold(history, 0, 1, 2)


async def test_versions_may_fork() -> None:
    chain = Chain(4)
    history = await chain.history(3)
    other = manifest_of(3, random_state(77))
    fork = deltas.encode(chain.states[1], random_state(77))
    await history.apply_delta(other, 1, chain.spool(fork))
    async with history.at(3) as state:
        assert bits_of(state) == bits_of(random_state(77))
    async with history.at(2) as state:
        assert bits_of(state) == chain.bits[2]


async def test_k_versions_cost_one_copy_and_the_deltas_between_them() -> None:
    chain = Chain(5, share=0.02)
    history = await chain.history(5)
    assert history.bytes_held == chain.size + sum(len(delta) for delta in chain.deltas)
    assert history.bytes_spilled == 0
    before = {name: tensor.data_ptr() for name, tensor in history._replica.state.items()}
    async with history.at(0) as state:
        assert {name: tensor.data_ptr() for name, tensor in state.items()} == before


async def test_a_version_that_is_held_is_not_taken_in_again() -> None:
    chain = Chain(3)
    history = await chain.history(3)
    async with history.at(0):
        pass
    await chain.apply(history, 2)
    await history.load_keyframe(chain.manifests[2], chain.keyframe(2))
    assert history.position == 0
    await chain.must_hold(history, 0, 1, 2)
    assert chain.open_spools == 2


async def test_a_number_cannot_be_held_with_other_bytes() -> None:
    chain, other = Chain(3), Chain(3, seed=9)
    history = await chain.history(3)
    with pytest.raises(Corrupt, match="version 2"):
        await other.apply(history, 2)
    with pytest.raises(Corrupt, match="version 2"):
        await history.load_keyframe(other.manifests[2], other.keyframe(2))
    await chain.must_hold(history, 0, 1, 2)


# --- only the newest


async def test_without_a_past_exactly_one_version_is_held_and_no_delta() -> None:
    chain = Chain(6)
    history = await chain.history(4, keep_past=False)
    assert (history.versions, history.newest, history.position) == ((3,), 3, 3)
    assert (history.bytes_held, history.bytes_spilled) == (chain.size, 0)
    assert chain.open_spools == 0
    await chain.must_hold(history, 3)
    memory = {name: tensor.data_ptr() for name, tensor in history._replica.state.items()}
    await history.load_keyframe(chain.manifests[5], chain.keyframe(5))
    await chain.must_hold(history, 5)
    assert {name: t.data_ptr() for name, t in history._replica.state.items()} == memory
    assert history.bytes_held == chain.size


# --- eviction


async def test_an_evicted_version_between_kept_ones_stays_as_a_way_point() -> None:
    chain = Chain(9)
    history = await chain.history(3)
    await history.load_keyframe(chain.manifests[8], chain.keyframe(8))  # 0 - 1 - 2 - 8
    async with history.at(0):
        pass
    await history.load_keyframe(chain.manifests[5], chain.keyframe(5))  # and 0 - 5
    held = history.bytes_held
    assert history.evict_below(5) == (0, 1, 2)
    await chain.must_hold(history, 5, 8)
    assert history.bytes_held == held  # all of them connect 5 and 8
    assert history.evict_below(6) == (5,)
    assert history.position == 8
    await chain.must_hold(history, 8)
    assert (history.bytes_held, chain.open_spools) == (chain.size, 0)


async def test_a_way_point_can_be_asked_for_again() -> None:
    chain = Chain(4)
    history = await chain.history(4)
    async with history.at(0):
        history.evict_below(3)
        assert history.versions == (3,)
        with pytest.raises(MissingVersion):
            history.manifest(1)
    async with history.at(3):
        pass
    history = await chain.history(4)
    async with history.at(0):
        pass
    history.evict_below(3)
    await chain.apply(history, 2)  # still there, between the copy and 3
    await history.load_keyframe(chain.manifests[1], chain.keyframe(1))
    await chain.must_hold(history, 1, 2, 3)


async def test_a_version_that_was_evicted_can_be_taken_in_again() -> None:
    chain = Chain(4)
    history = await chain.history(4)
    history.evict_below(3)
    await chain.must_hold(history, 3)
    await history.load_keyframe(chain.manifests[1], chain.keyframe(1))
    await chain.apply(history, 2)
    await chain.must_hold(history, 1, 2, 3)


@pytest.mark.parametrize("keep_past", [True, False])
async def test_a_delta_taken_back_brings_the_version_before(keep_past: bool) -> None:
    chain = Chain(5)
    history = await chain.history(keep_past=keep_past)
    await history.load_keyframe(chain.manifests[3], chain.keyframe(3))
    await history.apply_delta(chain.manifests[2], 3, chain.spool(3))
    await history.apply_delta(chain.manifests[1], 2, chain.spool(2))
    assert history.position == 1
    await chain.must_hold(history, *((1, 2, 3) if keep_past else (1,)))


async def test_a_version_below_the_mark_that_the_copy_is_at_is_not_lent_again() -> None:
    chain = Chain(5)
    history = await chain.history(5)
    async with history.at(1):
        pass
    assert history.evict_below(3) == (0, 1, 2)
    assert history.position == 1
    with pytest.raises(MissingVersion):
        async with history.at(1):
            pytest.fail("evicted")
    await chain.must_hold(history, 3, 4)
    assert history.bytes_held == chain.size + len(chain.deltas[4])


async def test_the_newest_version_is_never_evicted() -> None:
    chain = Chain(3)
    history = await chain.history(3)
    assert history.evict_below(99) == (0, 1)
    assert history.evict_below(99) == ()
    await chain.must_hold(history, 2)


async def test_eviction_during_a_lease_hides_at_once_and_drops_afterwards() -> None:
    chain = Chain(4)
    history = await chain.history(4)
    async with history.at(0) as state:
        assert history.evict_below(2) == (0, 1)
        assert history.versions == (2, 3)
        assert bits_of(state) == chain.bits[0]
        assert chain.open_spools == 3
    assert history.position == 0  # needed to get away from here
    await chain.must_hold(history, 2, 3)
    assert chain.open_spools == 1


async def test_clearing_during_a_lease_takes_effect_at_once_and_gives_back_afterwards() -> None:
    chain = Chain(3)
    history = await chain.history(3)
    async with history.at(1) as state:
        history.clear()
        assert (history.versions, history.newest) == ((), -1)
        assert history.evict_below(2) == ()
        assert bits_of(state) == chain.bits[1]
        assert history.bytes_held > 0
    assert (history.bytes_held, history.position, chain.open_spools) == (0, -1, 0)
    await history.load_keyframe(chain.manifests[1], chain.keyframe(1))
    await chain.must_hold(history, 1)


async def test_deltas_beyond_the_memory_they_may_take_go_to_files() -> None:
    chain = Chain(8)
    limit = len(chain.deltas[6]) + len(chain.deltas[7]) + 10
    history = await chain.history(8, spool_bytes=limit)
    assert history.bytes_held - chain.size <= limit
    assert history.bytes_held + history.bytes_spilled == chain.size + sum(map(len, chain.deltas))
    assert chain.open_spools == 2  # of those handed over; the others were copied to files
    await chain.must_hold(history, *range(8))
    history.evict_below(7)
    await chain.must_hold(history, 7)
    assert history.bytes_spilled == 0
