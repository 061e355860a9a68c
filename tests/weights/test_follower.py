from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import aclosing, contextmanager
from dataclasses import replace

import pytest

from shared.runtime import memory_bus
from shared.runtime.logs import Log
from shared.runtime.memory_bus import MemoryBus
from shared.weights import manifest_tail
from shared.weights.digests import sha256_of
from shared.weights.errors import MissingVersion
from shared.weights.follower import Follower
from shared.weights.history import WeightHistory
from shared.wire import codec, versioning
from shared.wire.codec import decode, encode
from shared.wire.subjects import Subjects
from shared.wire.versioning import WIRE_VERSION
from shared.wire.weights import Control, Manifest


@pytest.fixture
def run_of(new_publisher, make_state, mutate):
    """A publisher with n versions published, and their states."""

    async def make(n: int, **options):
        p = await new_publisher(**options)
        p.states = [make_state(0)]
        p.manifests = []

        async def more(count: int) -> None:
            for _ in range(count):
                p.manifests.append(await p.put(p.states[-1]))
                p.states.append(mutate(p.states[-1], len(p.states)))

        p.more = more
        await more(n)
        return p

    return make


async def _low_water(bus, mark: int) -> None:
    control = Control(phase="running", head_version=0, oldest_needed=mark, updated_at=0.0)
    await bus.put_control("control", encode(control))


def _chunks(server, artefact) -> list[int]:
    """Sequences of an artefact's chunks."""
    records = server.streams[Subjects("t").stream("chunks")].records
    return [seq for seq, r in records.items() if f".{artefact.upload_id}." in r.subject]


def _damage(server, artefact, how: str) -> None:
    stream = server.streams[Subjects("t").stream("chunks")]
    seq = _chunks(server, artefact)[-1]
    record = stream.records[seq]
    if how == "missing":
        stream.remove(seq)
    elif how == "truncated":
        stream.records[seq] = replace(record, payload=record.payload[:-1])
    else:
        flipped = bytes([record.payload[0] ^ 1]) + record.payload[1:]
        stream.records[seq] = replace(record, payload=flipped)


@contextmanager
def _tamper(server, change: Callable[[Manifest], Manifest]):
    """Let `change` see, damage or replace every manifest just before it is stored."""
    original = server.append

    def append(name, subject, payload, expected, msg_id):
        if subject.endswith(".manifest"):
            payload = encode(change(decode(payload, Manifest)))
        return original(name, subject, payload, expected, msg_id)

    server.append = append
    try:
        yield
    finally:
        server.append = original


async def test_every_version_arrives_bit_exact_and_in_order(run_of, following) -> None:
    p = await run_of(0)
    async with following("oldest_needed") as f:
        for count in (1, 3, 1, 5):
            await p.more(count)
            await f.until_head(len(p.manifests) - 1)
        assert f.versions == list(range(10))
        for manifest, state in zip(p.manifests, p.states, strict=False):
            held = f.history.materialise(manifest.version)
            assert sha256_of(held) == sha256_of(state) == manifest.sha256
        assert f.follower.resyncs == 0
        assert f.follower.versions_applied == 10
        assert f.follower.bytes_fetched > 0
        assert f.follower.seconds > 0


async def test_the_head_comes_with_the_names_that_changed(run_of, following) -> None:
    p = await run_of(1)
    async with following() as f:
        await f.until_head(0)
        await p.more(1)
        await f.until_head(1)
    assert f.changed == [None, {"wte.weight", "half.weight", "wide", "scalar"}]


async def test_a_late_joiner_takes_the_newest_keyframe_and_deltas_only(
    run_of, following, server, monkeypatch
) -> None:
    class Trickling(MemoryBus):
        """Delivers the log one manifest at a time, with pauses."""

        async def read(self, *args, **options):
            async with aclosing(super().read(*args, **options)) as batches:
                async for batch in batches:
                    yield batch
                    await asyncio.sleep(0.005)

    monkeypatch.setattr(memory_bus, "MAX_BATCH", 1)
    p = await run_of(11)
    async with following("newest", Trickling(Subjects("t"), server)) as f:
        await f.until_head(10)
        assert f.heads == [10]
        assert f.follower.versions_applied == 3  # keyframe 8, deltas 9 and 10
        assert f.history.versions == (10,)
        newest = p.manifests[10]
        assert sha256_of(f.history.materialise(10)) == newest.sha256


async def test_a_restarted_oracle_rebuilds_from_the_low_water_mark(
    run_of, following, new_bus
) -> None:
    p = await run_of(11)
    await _low_water(new_bus(), 6)
    async with following("oldest_needed") as f:
        await f.until_head(10)
        assert f.history.versions == (6, 7, 8, 9, 10)
        for version in f.history.versions:
            assert sha256_of(f.history.materialise(version)) == p.manifests[version].sha256


async def test_a_slow_follower_takes_several_deltas_in_one_pause_and_blocks_nobody(
    run_of, following
) -> None:
    p = await run_of(1)
    async with following() as slow, following() as fast:
        slow.pause_s = 0.3
        await fast.until_head(0)
        for version in range(1, 4):
            await p.more(1)
            await fast.until_head(version)
        await slow.until_head(3)
        assert fast.heads == [0, 1, 2, 3]
        assert slow.heads == [0, 3]
        assert fast.history.versions == (3,)


async def test_a_follower_that_starts_before_the_first_version_waits_for_it(
    run_of, following
) -> None:
    p = await run_of(0)
    async with following() as f:
        await asyncio.sleep(0.12)
        assert f.heads == []
        await p.more(1)
        await f.until_head(0)


@pytest.mark.parametrize("how", ["missing", "truncated", "flipped"])
@pytest.mark.parametrize("start", ["newest", "oldest_needed"])
async def test_a_damaged_delta_leaves_the_held_weights_and_heals_at_the_keyframe(
    run_of, following, server, how: str, start: str
) -> None:
    p = await run_of(2)
    async with following(start) as f:
        await f.until_head(1)
        held = sha256_of(f.history.materialise(1))

        def damage(manifest: Manifest) -> Manifest:
            _damage(server, manifest.delta, how)
            return manifest

        with _tamper(server, damage):
            await p.more(1)
        await f.until(lambda: f.follower.resyncs > 0)
        assert f.heads[-1] == 1
        assert f.history.newest == 1
        assert sha256_of(f.history.materialise(1)) == held
        await p.more(1)
        await asyncio.sleep(0.1)
        assert f.heads[-1] == 1
        await p.more(1)
        await f.until_head(4)
        assert sha256_of(f.history.materialise(4)) == p.manifests[4].sha256
        assert f.follower.newest_known == 4


async def test_a_chunk_that_appears_late_is_waited_for(run_of, following, server) -> None:
    p = await run_of(3)
    stream = server.streams[Subjects("t").stream("chunks")]
    seq = _chunks(server, p.manifests[1].delta)[0]
    late = stream.records[seq]
    stream.remove(seq)
    async with following("oldest_needed") as f:
        await f.until(lambda: f.follower.resyncs > 0)
        assert f.versions == [0]
        stream.records[seq] = late
        stream.by_subject[late.subject] = seq
        await f.until_head(2)
        assert f.versions == [0, 1, 2]


async def test_a_vanished_keyframe_is_replaced_by_the_one_before_it(
    run_of, following, server
) -> None:
    p = await run_of(7)
    for seq in _chunks(server, p.manifests[4].keyframe):
        server.streams[Subjects("t").stream("chunks")].remove(seq)
    async with following() as f:
        await f.until_head(6)
        assert f.follower.resyncs == 1
        assert sha256_of(f.history.materialise(6)) == p.manifests[6].sha256


async def test_a_delta_for_another_base_is_not_applied(run_of, following, server) -> None:
    p = await run_of(2)
    # Version 2 names the bytes of version 1's delta: intact, but for another base.
    stale = p.manifests[1].delta
    async with following() as f:
        await f.until_head(1)
        with _tamper(server, lambda m: m.model_copy(update={"delta": stale})):
            await p.more(1)
        await f.until(lambda: f.follower.resyncs > 0)
        assert f.heads == [1]
        await p.more(2)
        await f.until_head(4)


async def test_bytes_that_rebuild_another_version_are_never_shown(
    run_of, following, server
) -> None:
    p = await run_of(1)
    async with following() as f:
        await f.until_head(0)
        with _tamper(server, lambda m: m.model_copy(update={"sha256": "0" * 64})):
            await p.more(1)
        await f.until(lambda: f.follower.resyncs > 0)
        assert f.heads == [0]
        assert f.history.versions == (0,)


async def test_a_manifest_of_a_future_format_is_refused_until_it_can_be_read(
    run_of, following, server, monkeypatch
) -> None:
    p = await run_of(2)
    async with following() as f:
        await f.until_head(1)
        with monkeypatch.context() as future:
            future.setattr(codec, "WIRE_VERSION", (WIRE_VERSION[0] + 1, 0))
            await p.more(1)
        await f.until(lambda: bool(f.follower.refused))
        (reason,) = f.follower.refused.values()
        assert "upgrade" in reason
        assert f.heads == [1]
        with pytest.raises(TimeoutError):
            await f.follower.ensure(2, 0.1)
        monkeypatch.setattr(versioning, "WIRE_VERSION", (WIRE_VERSION[0] + 1, 0))
        await f.until_head(2)
        assert f.follower.refused == {}


async def test_a_refused_manifest_is_skipped_at_the_next_keyframe(
    run_of, following, monkeypatch
) -> None:
    p = await run_of(2)
    async with following() as f:
        with monkeypatch.context() as future:
            future.setattr(codec, "WIRE_VERSION", (WIRE_VERSION[0] + 1, 0))
            await p.more(1)
        await p.more(2)
        await f.until_head(4)
        assert sha256_of(f.history.materialise(4)) == p.manifests[4].sha256


async def test_ensure_fetches_an_old_version_without_disturbing_the_head(run_of, following) -> None:
    p = await run_of(7)
    async with following("newest") as f:
        await f.until_head(6)
        assert f.history.versions == (6,)
        results = await asyncio.gather(*[f.follower.ensure(v, 2.0) for v in (2, 5, 2, 6)])
        for version, state in zip((2, 5, 2, 6), results, strict=True):
            assert sha256_of(state) == p.manifests[version].sha256
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
        assert sha256_of(await waiting) == p.manifests[1].sha256


async def test_ensure_says_that_a_purged_version_is_gone_for_good(run_of, following) -> None:
    p = await run_of(10)
    assert await p.publisher.purge_below(9) == 8
    async with following() as f:
        await f.until_head(9)
        with pytest.raises(MissingVersion) as caught:
            await f.follower.ensure(7, 2.0)
        assert caught.value.version == 7
        assert sha256_of(await f.follower.ensure(8, 2.0)) == p.manifests[8].sha256


async def test_ensure_does_not_wait_for_a_version_that_the_log_skips(
    run_of, following, server
) -> None:
    await run_of(7)
    server.streams[Subjects("t").stream("manifests")].remove(4)
    async with following() as f:
        await f.until_head(6)
        with pytest.raises(MissingVersion):
            await f.follower.ensure(3, 5.0)


async def test_ensure_tries_every_way_before_it_gives_up(run_of, following, server) -> None:
    p = await run_of(7)
    async with following() as f:
        await f.until_head(6)
        f.history.evict_below(6)
        _damage(server, p.manifests[4].keyframe, "flipped")
        assert sha256_of(await f.follower.ensure(5, 2.0)) == p.manifests[5].sha256
        _damage(server, p.manifests[0].keyframe, "missing")
        with pytest.raises(MissingVersion):
            await f.follower.ensure(3, 2.0)


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

    async def on_head(manifest, state, changed) -> None:
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
