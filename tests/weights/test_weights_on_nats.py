from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, suppress

import pytest

from shared.runtime.errors import Fenced
from shared.runtime.logs import Log
from shared.runtime.nats_bus import NatsBus, connect
from shared.runtime.sections import BusSection
from shared.weights.digests import sha256_of
from shared.weights.errors import MissingVersion
from shared.weights.manifest_log import read_log
from shared.wire.codec import decode
from shared.wire.weights import Artefact, Manifest


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
        async with following("oldest_needed", await connected(nats_server)) as late:
            await late.until_head(9)
            assert late.versions == list(range(4, 10))
            assert await late.sha256(5) == manifests[5].sha256
            with pytest.raises(MissingVersion):
                await late.follower.ensure(3, 3.0)
        await all_of_them.until_head(9)
        for version in range(10):
            assert await all_of_them.sha256(version) == manifests[version].sha256
        assert all_of_them.follower.resyncs == 0
    retained = (await read_log(bus)).manifests
    assert [entry.manifest.version for entry in retained] == list(range(4, 10))


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
        last = None
        while last is None:
            # The last append of the dead may still be on its way, and fence us.
            with suppress(Fenced):
                last = await (await new_publisher(bus)).put(state)
        await f.until_head(last.version)
        log = await read_log(bus)
        logged = [entry.manifest for entry in log.manifests]
        assert [m.version for m in logged] == list(range(last.version + 1))
        assert all(published.get(m.version, m.digest) == m.digest for m in logged)
        assert f.versions == [m.version for m in logged]
        before = (await bus.stream_state("chunks")).num_messages
        await p.publisher.start()
        await p.publisher.sweep_orphans(min_age_s=-60.0)
        artefacts = [a for m in logged for a in (m.keyframe, m.delta) if a is not None]
        artefacts += [keyframe.artefact for keyframe in log.keyframes]
        referenced = sum(artefact.num_chunks for artefact in artefacts)
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
            assert await f.sha256(after.version) == after.sha256
            state = mutate(state, life + 10)
        assert after.version == 3


async def test_a_slow_follower_delays_neither_the_publisher_nor_another_follower(
    nats_server, connected, run_of, following
) -> None:
    p = await run_of(1, await connected(nats_server))
    async with (
        following("newest", await connected(nats_server)) as slow,
        following("newest", await connected(nats_server)) as fast,
    ):
        await slow.until_head(0)
        await fast.until_head(0)
        slow.pause_s = 1.5
        began = time.perf_counter()
        for version in range(1, 6):
            await p.more(1)
            await fast.until_head(version)
        assert time.perf_counter() - began < 1.5
        assert fast.heads == list(range(6))
        await slow.until_head(5)
        assert len(slow.heads) <= 4


async def test_sixty_versions_with_every_kind_of_fault_end_at_the_published_digests(
    mortal_nats_server, connected, run_of, following, monkeypatch
) -> None:
    """The server is killed and restarted; chunks and keyframes vanish; the log is purged."""
    rng = random.Random(1)
    bus = await connected(mortal_nats_server)
    p = await run_of(1, bus, keyframe_every=8)

    async def lose(artefact: Artefact) -> None:
        subject = bus.subjects.chunk(artefact.upload_id, rng.randrange(artefact.num_chunks))
        await bus.purge("chunks", (await bus.stream_state("chunks")).last_seq + 1, subject=subject)

    async def append_after_a_loss(subject: str, payload: bytes, **options: object) -> int:
        if subject == bus.subjects.manifest:
            await lose(decode(payload, Manifest).delta)
        return await NatsBus.append(bus, subject, payload, **options)

    async def crash() -> None:
        mortal_nats_server.kill()
        await asyncio.sleep(0.1)
        await asyncio.to_thread(mortal_nats_server.start)

    async with (
        following("newest", await connected(mortal_nats_server)) as newest,
        following("oldest_needed", await connected(mortal_nats_server)) as every,
    ):
        for version in range(1, 60):
            with monkeypatch.context() as lossy:
                if version % 6 == 5:
                    lossy.setattr(bus, "append", append_after_a_loss)
                crashing = [crash()] if version % 20 == 7 else []
                await asyncio.gather(p.more(1), *crashing)
            keyframes = (await read_log(bus)).keyframes if version % 16 == 1 else []
            if keyframes:
                await lose(keyframes[-1].artefact)
            if version == 40:
                assert await p.publisher.purge_below(30) is not None
            if newest.follower.keyframe_wanted or every.follower.keyframe_wanted:
                await p.publisher.publish_keyframe(reason="wanted")
        await p.publisher.publish_keyframe(reason="wanted")
        for f in (newest, every):
            await f.until_head(59, timeout_s=20.0)
            assert await f.sha256(59) == p.manifests[59].sha256 == sha256_of(p.states[59])
        for version in every.history.versions:
            assert await every.sha256(version) == p.manifests[version].sha256
        assert len(every.history.versions) >= 15
        assert newest.follower.resyncs > 0
        assert every.follower.resyncs >= 10
        assert not newest.follower.keyframe_wanted
        async with following("oldest_needed", await connected(mortal_nats_server)) as late:
            await late.until_head(59, timeout_s=20.0)
            assert await late.sha256(59) == p.manifests[59].sha256
            assert late.follower.resyncs > 0
