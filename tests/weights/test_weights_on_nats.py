from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack

import pytest

from shared.runtime.errors import Fenced
from shared.runtime.logs import Log
from shared.runtime.nats_bus import NatsBus, connect
from shared.runtime.sections import BusSection
from shared.weights.digests import sha256_of
from shared.weights.errors import MissingVersion
from shared.weights.manifest_log import read_retained


@pytest.fixture
async def connected(subjects) -> AsyncIterator[Callable[..., NatsBus]]:
    """Buses to a server, streams created; closed at the end."""
    async with AsyncExitStack() as stack:

        async def make(server, name: str = "t") -> NatsBus:
            section = BusSection(url=server.url, request_timeout_s=1.0, retry_s=20.0)
            bus = await connect(section, subjects, name, Log("test"))
            stack.push_async_callback(bus.close)
            await bus.create_streams()
            return bus

        yield make


async def test_followers_converge_through_chunks_purges_and_late_joining(
    nats_server, connected, new_publisher, make_state, mutate, following
) -> None:
    bus = await connected(nats_server)
    p = await new_publisher(bus)
    state = make_state(0)
    manifests = []

    async def more(count: int) -> None:
        nonlocal state
        for _ in range(count):
            manifests.append(await p.put(state))
            state = mutate(state, len(manifests))

    async with following("oldest_needed", await connected(nats_server)) as all_of_them:
        await more(7)
        await all_of_them.until_head(6)
        assert all_of_them.versions == list(range(7))
        assert await p.publisher.purge_below(5) == 4
        await more(3)
        async with following("newest", await connected(nats_server)) as late:
            await late.until_head(9)
            assert late.heads == [9]
            assert sha256_of(await late.follower.ensure(5, 3.0)) == manifests[5].sha256
            with pytest.raises(MissingVersion):
                await late.follower.ensure(3, 3.0)
        await all_of_them.until_head(9)
        for version in range(10):
            held = all_of_them.history.materialise(version)
            assert sha256_of(held) == manifests[version].sha256
        assert all_of_them.follower.resyncs == 0
    assert [e.manifest.version for e in await read_retained(bus)] == list(range(4, 10))


async def test_of_two_publishers_at_once_exactly_one_gets_the_number(
    nats_server, connected, new_publisher, make_state
) -> None:
    a = await new_publisher(await connected(nats_server), producer="a")
    b = await new_publisher(await connected(nats_server), producer="b")
    results = await asyncio.gather(
        a.put(make_state(1)), b.put(make_state(2)), return_exceptions=True
    )
    assert sorted(type(r).__name__ for r in results) == ["Fenced", "Manifest"]
    loser = a if isinstance(results[0], Fenced) else b
    assert (await loser.publisher.start()).version == 0
    assert (await loser.put(make_state(3))).version == 1


async def test_publishers_that_die_anywhere_leave_a_log_without_gap_or_reuse(
    nats_server, connected, new_publisher, make_state, mutate, following
) -> None:
    bus = await connected(nats_server)
    rng = random.Random(0)
    state = make_state(0)
    published: dict[int, str] = {}
    async with following("oldest_needed", await connected(nats_server)) as f:
        for life in range(8):
            p = await new_publisher(bus)
            if p.head is not None:
                known = published.setdefault(p.head.version, p.head.digest)
                assert known == p.head.digest
            task = asyncio.create_task(p.put(state))
            await asyncio.sleep(rng.random() * 0.02)
            task.cancel()
            for result in await asyncio.gather(task, return_exceptions=True):
                if not isinstance(result, BaseException):
                    published[result.version] = result.digest
            state = mutate(state, life)
        last = await (await new_publisher(bus)).put(state)
        await f.until_head(last.version)
        logged = [e.manifest for e in await read_retained(bus)]
        assert [m.version for m in logged] == list(range(last.version + 1))
        assert all(published.get(m.version, m.digest) == m.digest for m in logged)
        assert f.versions == [m.version for m in logged]
        before = (await bus.stream_state("chunks")).num_messages
        await p.publisher.start()
        await p.publisher.sweep_orphans(min_age_s=-60.0)
        referenced = sum(
            a.num_chunks for m in logged for a in (m.keyframe, m.delta) if a is not None
        )
        assert (await bus.stream_state("chunks")).num_messages == referenced <= before


async def test_everyone_goes_on_after_the_server_was_killed(
    mortal_nats_server, connected, new_publisher, make_state, mutate, following
) -> None:
    p = await new_publisher(await connected(mortal_nats_server))
    state = make_state(0)
    async with following("newest", await connected(mortal_nats_server)) as f:
        for life in range(2):
            before = await p.put(state)
            await f.until_head(before.version)
            state = mutate(state, life)
            mortal_nats_server.kill()
            publishing = asyncio.create_task(p.put(state))
            await asyncio.sleep(0.2)
            mortal_nats_server.start()
            after = await publishing
            await f.until(lambda v=after.version: f.heads[-1] == v, timeout_s=15)
            assert sha256_of(f.history.materialise(after.version)) == after.sha256
            state = mutate(state, life + 10)
        assert after.version == 3
