from __future__ import annotations

import asyncio

import pytest

from shared.runtime.logs import Log
from shared.weights.digests import sha256_of
from shared.weights.follower import Follower
from shared.weights.history import WeightHistory


@pytest.mark.parametrize("start", ["newest", "oldest_needed"])
async def test_a_flipped_bit_in_the_copy_is_found_at_the_next_keyframe_record_and_heals(
    run_of, following, start: str
) -> None:
    p = await run_of(3, keyframe_every=100)
    async with following(start) as f:
        await f.until_head(2)
        async with f.history.at(2) as state:
            state["half2.weight"][1] += 1.0  # no delta touches it
        assert f.follower.resyncs == 0
        await p.publisher.publish_keyframe(reason="due")
        await f.until(lambda: f.follower.resyncs == 1)
        await f.until(lambda: f.heads == [2, 2])
        assert f.changed[-1] is None
        assert await f.sha256(2) == p.manifests[2].sha256
        if start == "oldest_needed":
            assert f.history.versions == (0, 1, 2)
            for version in range(3):
                assert await f.sha256(version) == p.manifests[version].sha256
        await p.more(1)
        await f.until_head(3)
        assert f.follower.resyncs == 1


async def test_a_copy_that_is_right_is_compared_once_per_keyframe_record(
    run_of, following, monkeypatch
) -> None:
    compared: list[int] = []
    verify = WeightHistory.verify

    async def counted(self, version: int, sha256: str) -> bool:
        compared.append(version)
        return await verify(self, version, sha256)

    monkeypatch.setattr(WeightHistory, "verify", counted)
    p = await run_of(2, keyframe_every=100)
    async with following() as f:
        await f.until_head(1)
        for _ in range(2):
            await p.publisher.publish_keyframe(reason="wanted")
        await f.until(lambda: bool(compared))
        await p.more(1)
        await f.until_head(2)
        await p.publisher.publish_keyframe(reason="due")
        await f.until(lambda: len(compared) == 2)
        assert compared == [1, 2]
        assert f.heads == [1, 2]
        assert f.follower.resyncs == 0
    async with following() as joiner:
        await joiner.until_head(2)
        await asyncio.sleep(0.1)
        assert compared == [1, 2]  # what a keyframe was just read from needs no second look


async def test_a_callback_that_finds_its_version_wrong_sees_it_again_once_it_is_right(
    run_of, new_bus
) -> None:
    p = await run_of(3, keyframe_every=100)
    history = WeightHistory()
    follower = Follower(new_bus(), history, log=Log("t"), retry_s=0.05)
    told: list[int] = []
    tried: list[int] = []
    shown: list[int] = []

    async def on_version(manifest) -> None:
        told.append(manifest.version)
        if told == [0, 1, 2]:  # an element on the way from 0 to 2, in the copy that is at 0
            async with history.at(0) as state:
                state["scalar"].fill_(-7.0)

    async def on_head(manifest, changed) -> None:
        tried.append(manifest.version)
        async with history.at(manifest.version) as state:
            assert sha256_of(state) == p.manifests[2].sha256
        shown.append(manifest.version)

    task = asyncio.create_task(follower.run(on_head, start="oldest_needed", on_version=on_version))
    try:
        async with asyncio.timeout(5):
            while not shown:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert told == [0, 1, 2, 0, 1, 2]
    assert (tried, shown) == ([2, 2], [2])
    assert follower.resyncs == 1
