from __future__ import annotations

import asyncio
import time

import pytest

from shared.runtime import memory_bus
from shared.runtime.logs import Log
from shared.weights import manifest_tail
from shared.weights.digests import sha256_of
from shared.weights.follower import Follower
from shared.weights.history import WeightHistory


async def test_every_version_arrives_bit_exact_and_in_order(run_of, following) -> None:
    p = await run_of(0)
    async with following("oldest_needed") as f:
        for count in (1, 3, 1, 5):
            await p.more(count)
            await f.until_head(len(p.manifests) - 1)
        assert f.versions == list(range(10))
        for manifest, state in zip(p.manifests, p.states, strict=False):
            assert await f.sha256(manifest.version) == sha256_of(state) == manifest.sha256
        assert f.follower.resyncs == 0
        assert f.follower.versions_applied == 10
        assert f.follower.bytes_fetched > 0
        assert f.follower.seconds > 0
        assert not f.follower.keyframe_wanted


async def test_the_head_comes_with_the_names_that_changed(run_of, following) -> None:
    p = await run_of(1)
    async with following() as f:
        await f.until_head(0)
        await p.more(1)
        await f.until_head(1)
    assert f.changed == [None, {"wte.weight", "half.weight", "wide", "scalar"}]


async def test_a_late_joiner_takes_the_newest_keyframe_and_deltas_only(
    run_of, following, faults, monkeypatch
) -> None:
    monkeypatch.setattr(memory_bus, "MAX_BATCH", 1)
    p = await run_of(11)
    async with following("newest", faults.trickling()) as f:
        await f.until_head(10)
        assert f.heads == [10]
        assert f.follower.versions_applied == 3  # keyframe 8, deltas 9 and 10
        assert f.history.versions == (10,)
        assert await f.sha256(10) == p.manifests[10].sha256


async def test_a_restarted_oracle_rebuilds_from_a_keyframe_record_down_to_the_mark(
    run_of, following, faults
) -> None:
    p = await run_of(11)
    await p.publisher.purge_below(6)
    await faults.low_water(6)
    async with following("oldest_needed") as f:
        await f.until_head(10)
        assert f.versions == [6, 7, 8, 9, 10]
        assert f.history.versions == (6, 7, 8, 9, 10)
        for version in f.history.versions:
            assert await f.sha256(version) == p.manifests[version].sha256
        assert f.follower.versions_applied <= 7  # keyframe 4, deltas 5..10, or from 8 both ways


async def test_a_follower_far_behind_takes_several_deltas_in_one_go_and_shows_the_head_once(
    run_of, following
) -> None:
    p = await run_of(1, keyframe_every=100)
    async with following() as f:
        await f.until_head(0)
        f.pause_s = 0.2
        await p.more(1)
        await f.until_head(1)
        await p.more(3)
        await f.until_head(4)
        assert f.heads == [0, 1, 4]
        assert f.history.versions == (4,)
        assert f.follower.versions_applied == 5


@pytest.mark.parametrize("start", ["newest", "oldest_needed"])
async def test_a_slow_follower_delays_neither_the_publisher_nor_another_follower(
    run_of, following, start: str
) -> None:
    p = await run_of(1)
    async with following(start) as slow, following(start) as fast:
        await fast.until_head(0)
        await slow.until_head(0)
        slow.pause_s = 0.8
        began = time.perf_counter()
        for version in range(1, 7):
            await p.more(1)
            await fast.until_head(version)
        assert time.perf_counter() - began < 0.8
        assert fast.heads == list(range(7))
        await slow.until_head(6)
        assert len(slow.heads) <= 4
        assert await slow.sha256(6) == p.manifests[6].sha256


async def test_a_follower_that_starts_before_the_first_version_waits_for_it(
    run_of, following
) -> None:
    p = await run_of(0)
    async with following() as f:
        await asyncio.sleep(0.12)
        assert f.heads == []
        await p.more(1)
        await f.until_head(0)


async def test_a_newer_keyframe_is_taken_where_it_costs_fewer_bytes_than_the_deltas(
    run_of, following, make_state, new_publisher
) -> None:
    p = await new_publisher(keyframe_every=100)
    states = [make_state(seed) for seed in range(6)]  # nothing in common: deltas as large
    async with following() as f:
        await p.put(states[0])
        await f.until_head(0)
        f.pause_s = 0.3
        await p.put(states[1])
        await f.until_head(1)
        for state in states[2:]:
            await p.put(state)
        await p.publisher.publish_keyframe(reason="wanted")
        await f.until_head(5)
        assert f.follower.versions_applied == 3
        assert await f.sha256(5) == sha256_of(states[5])


async def test_a_follower_goes_on_after_the_bus_was_away(run_of, following, server) -> None:
    p = await run_of(1)
    async with following() as f:
        await f.until_head(0)
        server.set_up(False)
        publishing = asyncio.create_task(p.more(2))
        await asyncio.sleep(0.1)
        server.set_up(True)
        await publishing
        await f.until_head(2)


async def test_a_restarted_follower_keeps_its_history_object_and_catches_up(
    run_of, following
) -> None:
    p = await run_of(3)
    history = WeightHistory()
    async with following("oldest_needed", history=history) as f:
        await f.until_head(2)
    await p.more(3)
    async with following("oldest_needed", history=history) as f:
        await f.until_head(5)
        assert history.versions == tuple(range(6))
        assert f.follower.versions_applied == 3


async def test_an_error_of_the_callback_ends_the_follower(run_of, new_bus) -> None:
    await run_of(1)

    async def on_head(manifest, changed) -> None:
        raise LookupError("engine says no")

    follower = Follower(new_bus(), WeightHistory(), log=Log("t"))
    with pytest.raises(ExceptionGroup) as caught:
        async with asyncio.timeout(2):
            await follower.run(on_head)
    assert isinstance(caught.value.exceptions[0], LookupError)


async def test_the_log_of_a_long_run_is_forgotten_as_it_is_purged(
    run_of, following, monkeypatch
) -> None:
    monkeypatch.setattr(manifest_tail, "PRUNE_EVERY", 4)
    p = await run_of(1)
    async with following() as f:
        for _ in range(6):
            await p.more(4)
            await p.publisher.purge_below(p.publisher.head.version)
            await f.until_head(p.publisher.head.version)
        assert len(f.follower._tail.manifests) <= 12
