from __future__ import annotations

import asyncio

import pytest
import torch

from shared.runtime.errors import BusUnavailable, Conflict, Fatal, Fenced
from shared.runtime.memory_bus import MemoryBus
from shared.weights.digests import sha256_of, specs, version_digest
from shared.weights.manifest_log import read_retained
from shared.weights.orphans import ORPHAN_AGE_S
from shared.wire import codec
from shared.wire.subjects import Subjects


class Faulty(MemoryBus):
    """Fails the manifest append in one of the ways a network can."""

    fault = ""

    async def append(self, subject, payload, **options) -> int:
        if not subject.endswith(".manifest") or not self.fault:
            return await super().append(subject, payload, **options)
        fault, self.fault = self.fault, ""
        if fault == "crash before":
            raise BusUnavailable("injected")
        await super().append(subject, payload, **options)
        if fault == "lost acknowledgement":
            options["msg_id"] = None  # the server forgot the id: only the fence is left
            return await super().append(subject, payload, **options)
        raise BusUnavailable("injected")


@pytest.fixture
def faulty(server) -> Faulty:
    return Faulty(Subjects("t"), server)


async def _log(bus) -> list[tuple[int, str]]:
    return [(e.manifest.version, e.manifest.digest) for e in await read_retained(bus)]


async def test_versions_count_from_zero_with_keyframes_and_deltas(
    new_publisher, make_state, mutate
) -> None:
    p = await new_publisher()
    assert p.head is None
    state = make_state(0)
    manifests = []
    for i in range(6):
        manifests.append(await p.put(state, epoch=0, optimizer_steps=i))
        state = mutate(state, i)
    assert [m.version for m in manifests] == list(range(6))
    assert [m.parent for m in manifests] == [None, 0, 1, 2, 3, 4]
    assert [m.keyframe is not None for m in manifests] == [True, False, False, False, True, False]
    assert [m.delta is not None for m in manifests] == [False, True, True, True, True, True]
    assert len({m.upload_id for m in manifests}) == 6
    assert manifests[2].sha256 is not None
    assert manifests[5].optimizer_steps == 5
    assert p.publisher.head == manifests[5]


async def test_training_on_while_the_upload_runs_does_not_reach_the_published_bytes(
    new_publisher, make_state, following
) -> None:
    p = await new_publisher()
    live = make_state(0)
    before = {name: t.clone() for name, t in live.items()}
    publishing = asyncio.create_task(p.put(live))
    await asyncio.sleep(0)
    for tensor in live.values():
        tensor.add_(1)
    manifest = await publishing
    assert manifest.sha256 == sha256_of(before)
    async with following() as f:
        await f.until_head(0)
        assert sha256_of(f.history.materialise(0)) == manifest.sha256


async def test_the_slower_of_two_publishers_is_fenced(new_publisher, make_state, new_bus) -> None:
    stalled = await new_publisher()
    await stalled.put(make_state(0))
    other = await new_publisher()
    assert other.head.version == 0
    await other.put(make_state(1), previous_state=make_state(0))
    with pytest.raises(Fenced, match="version 1"):
        await stalled.put(make_state(2))
    assert len(await _log(new_bus())) == 2
    await other.put(make_state(3))
    assert [v for v, _ in await _log(new_bus())] == [0, 1, 2]


async def test_two_publishers_of_a_fresh_run_allocate_version_zero_once(
    new_publisher, make_state
) -> None:
    a, b = await new_publisher(), await new_publisher()
    await b.put(make_state(1))
    with pytest.raises(Fenced):
        await a.put(make_state(1))


async def test_a_lost_acknowledgement_is_a_success_after_reading_back(
    new_publisher, make_state, faulty
) -> None:
    p = await new_publisher(faulty)
    faulty.fault = "lost acknowledgement"
    first = await p.put(make_state(0))
    assert first.version == 0
    assert (await p.put(make_state(1))).version == 1
    assert [v for v, _ in await _log(faulty)] == [0, 1]


async def test_publishing_again_after_an_unknown_outcome_adopts_what_was_stored(
    new_publisher, make_state, faulty
) -> None:
    p = await new_publisher(faulty)
    await p.put(make_state(0))
    faulty.fault = "crash after"
    with pytest.raises(BusUnavailable):
        await p.put(make_state(1))
    again = await p.put(make_state(1))
    assert again.version == 1
    assert len(await _log(faulty)) == 2
    faulty.fault = "crash after"
    with pytest.raises(BusUnavailable):
        await p.put(make_state(2))
    with pytest.raises(Fatal, match="never reused"):
        await p.put(make_state(3))


@pytest.mark.parametrize("fault", ["crash before", "crash after"])
async def test_a_restart_sees_nothing_or_the_version_and_reuses_no_number(
    new_publisher, make_state, faulty, following, fault: str
) -> None:
    p = await new_publisher(faulty)
    await p.put(make_state(0))
    faulty.fault = fault
    with pytest.raises(BusUnavailable):
        await p.put(make_state(1))
    q = await new_publisher()
    seen = version_digest(specs(make_state(1)))
    if fault == "crash after":
        assert (q.head.version, q.head.digest) == (1, seen)
        assert await q.publisher.manifest(1) == q.head
        following_version = await q.put(make_state(5), previous_state=make_state(1))
        assert following_version.version == 2
        assert following_version.delta is not None
    else:
        assert q.head.version == 0
        following_version = await q.put(make_state(5), previous_state=make_state(0))
        assert following_version.version == 1
    digests = dict(await _log(faulty))
    assert len(digests) == len(await _log(faulty))
    async with following() as f:
        await f.until_head(following_version.version)


async def test_a_restarted_publisher_without_the_heads_bytes_publishes_a_keyframe(
    new_publisher, make_state
) -> None:
    await (await new_publisher()).put(make_state(0))
    q = await new_publisher()
    manifest = await q.put(make_state(1), previous_state=make_state(7))
    assert manifest.delta is None
    assert manifest.keyframe is not None
    assert (await q.put(make_state(2))).delta is not None


async def test_purging_keeps_the_keyframe_at_or_below_the_mark_and_all_after_it(
    new_publisher, make_state, mutate, new_bus, following
) -> None:
    p = await new_publisher()
    state = make_state(0)
    states = []
    for i in range(11):
        states.append(state)
        await p.put(state)
        state = mutate(state, i)
    bus = new_bus()
    assert await p.publisher.purge_below(3) is None
    assert await p.publisher.purge_below(7) == 4
    assert await p.publisher.purge_below(7) is None
    assert [v for v, _ in await _log(bus)] == list(range(4, 11))
    async with following("oldest_needed") as f:
        await f.until_head(10)
        assert f.versions == list(range(4, 11))
        assert sha256_of(f.history.materialise(7)) == sha256_of(states[7])
    assert p.publisher.head.version == 10
    assert (await p.put(state)).version == 11
    chunks = await bus.stream_state("chunks")
    assert chunks.first_seq > 1
    q = await new_publisher()
    assert await q.publisher.purge_below(8) == 8
    assert await q.publisher.manifest(7) is None
    assert (await q.publisher.manifest(9)).version == 9


async def test_orphans_are_swept_by_age_and_named_uploads_stay(
    new_publisher, make_state, faulty, server, following
) -> None:
    now = [1000.0]
    server.clock = lambda: now[0]
    p = await new_publisher(faulty, clock=lambda: now[0])
    await p.put(make_state(0))
    faulty.fault = "crash before"
    with pytest.raises(BusUnavailable):
        await p.put(make_state(1))
    q = await new_publisher(clock=lambda: now[0])
    before = (await faulty.stream_state("chunks")).num_messages
    assert await q.publisher.sweep_orphans() == 0
    now[0] += ORPHAN_AGE_S
    assert await q.publisher.sweep_orphans() == 1
    assert 0 < (await faulty.stream_state("chunks")).num_messages < before
    assert await q.publisher.sweep_orphans() == 0
    async with following() as f:
        await f.until_head(0)


async def test_nothing_is_swept_while_a_manifest_cannot_be_read(
    new_publisher, make_state, new_bus, monkeypatch
) -> None:
    p = await new_publisher()
    with monkeypatch.context() as future:
        future.setattr(codec, "WIRE_VERSION", (99, 0))
        await p.put(make_state(0))
    await p.put(make_state(1))
    before = (await new_bus().stream_state("chunks")).num_messages
    assert await p.publisher.sweep_orphans(min_age_s=-60.0) == 0
    assert (await new_bus().stream_state("chunks")).num_messages == before > 0


async def test_an_upload_that_sweepers_may_have_taken_is_not_committed(
    new_publisher, make_state, new_bus
) -> None:
    now = [1000.0]

    def clock() -> float:
        now[0] += ORPHAN_AGE_S
        return now[0]

    p = await new_publisher(clock=clock)
    with pytest.raises(BusUnavailable, match="too long"):
        await p.put(make_state(0))
    assert await _log(new_bus()) == []


async def test_a_conflict_that_is_not_ours_names_the_other_producer(
    new_publisher, make_state
) -> None:
    a, b = await new_publisher(), await new_publisher(producer="learner-7")
    await b.put(make_state(0))
    with pytest.raises(Fenced, match="learner-7") as caught:
        await a.put({"w": torch.zeros(2)})
    assert isinstance(caught.value.__cause__, Conflict)
