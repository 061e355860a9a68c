from __future__ import annotations

import asyncio

import pytest

from shared.weights.errors import MissingVersion
from shared.weights.history import WeightHistory
from shared.wire.subjects import Subjects


async def test_ensure_fetches_an_old_version_without_disturbing_the_head(run_of, following) -> None:
    p = await run_of(7)
    async with following("newest", history=WeightHistory()) as f:
        await f.until_head(6)
        assert f.history.versions == (6,)
        await asyncio.gather(*[f.follower.ensure(v, 2.0) for v in (2, 5, 2, 6)])
        for version in (2, 5, 6):
            assert await f.sha256(version) == p.manifests[version].sha256
        assert f.heads == [6]
        assert f.history.newest == 6


async def test_ensure_waits_for_a_version_to_be_published(run_of, following) -> None:
    p = await run_of(1)
    async with following() as f:
        await f.until_head(0)
        with pytest.raises(TimeoutError):
            await f.follower.ensure(1, 0.05)
        waiting = asyncio.create_task(f.follower.ensure(1, 2.0))
        await p.more(1)
        await waiting
        assert await f.sha256(1) == p.manifests[1].sha256


async def test_a_version_that_was_cleared_is_fetched_again_by_ensure(run_of, following) -> None:
    p = await run_of(5)
    async with following("oldest_needed") as f:
        await f.until_head(4)
        f.history.clear()
        await f.follower.ensure(2, 2.0)
        assert await f.sha256(2) == p.manifests[2].sha256
        await p.more(1)
        await f.until_head(5)
        assert await f.sha256(2) == p.manifests[2].sha256
        assert await f.sha256(5) == p.manifests[5].sha256


async def test_ensure_says_that_a_purged_version_is_gone_for_good(run_of, following) -> None:
    p = await run_of(10)
    assert await p.publisher.purge_below(9) == 8
    async with following(history=WeightHistory()) as f:
        await f.until_head(9)
        with pytest.raises(MissingVersion) as caught:
            await f.follower.ensure(7, 2.0)
        assert caught.value.version == 7
        await f.follower.ensure(8, 2.0)
        assert await f.sha256(8) == p.manifests[8].sha256


async def test_ensure_does_not_wait_for_a_version_that_the_log_skips(
    run_of, following, server
) -> None:
    await run_of(7)
    server.streams[Subjects("t").stream("manifests")].remove(4)
    async with following(history=WeightHistory()) as f:
        await f.until_head(6)
        with pytest.raises(MissingVersion):
            await f.follower.ensure(3, 5.0)


async def test_ensure_tries_every_way_before_it_gives_up(run_of, following, faults) -> None:
    p = await run_of(7)
    async with following(history=WeightHistory()) as f:
        await f.until_head(6)
        faults.damage(p.manifests[6].delta, "flipped")  # back from the head
        faults.damage(p.manifests[5].delta, "missing")  # on from the keyframe
        with pytest.raises(MissingVersion):
            await f.follower.ensure(5, 2.0)
        await f.follower.ensure(4, 2.0)
        assert await f.sha256(4) == p.manifests[4].sha256
        assert f.heads == [6]
