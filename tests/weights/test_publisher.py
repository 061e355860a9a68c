from __future__ import annotations

import asyncio
import os

import pytest
import torch

from shared.runtime.errors import BusUnavailable, Conflict, Fatal, Fenced
from shared.runtime.memory_bus import MemoryBus
from shared.weights import stored_version
from shared.weights.digests import sha256_of, specs, version_digest
from shared.weights.errors import WrongBase
from shared.weights.keyframe_store import KeyframeStore
from shared.weights.manifest_log import read_log
from shared.weights.orphans import ORPHAN_AGE_S
from shared.wire import codec
from shared.wire.subjects import Subjects


class Faulty(MemoryBus):
    """Fails the manifest append in one of the ways a network can."""

    fault = ""

    async def append(self, subject, payload, **options) -> int:
        if not subject.endswith(".manifest.version") or not self.fault:
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
    return [(e.manifest.version, e.manifest.digest) for e in (await read_log(bus)).manifests]


async def test_versions_count_from_zero_and_keyframes_are_announced_after_them(
    run_of, new_bus
) -> None:
    p = await run_of(0)
    assert p.head is None
    await p.more(6)
    manifests = p.manifests
    assert [m.version for m in manifests] == list(range(6))
    assert [m.parent for m in manifests] == [None, 0, 1, 2, 3, 4]
    assert [m.keyframe is not None for m in manifests] == [True] + 5 * [False]
    assert [m.delta is not None for m in manifests] == [False] + 5 * [True]
    assert len({m.upload_id for m in manifests}) == 6
    for manifest, state in zip(manifests, p.states, strict=False):
        assert manifest.tensors == specs(state)
        assert manifest.digest == version_digest(specs(state))
        assert manifest.sha256 == sha256_of(state)
    (record,) = (await read_log(new_bus())).keyframes
    assert (record.version, record.digest) == (4, manifests[4].digest)
    assert record.sha256 == manifests[4].sha256
    assert p.publisher.head == manifests[5]


async def test_the_live_weights_may_train_on_once_publish_has_returned(
    new_publisher, make_state, mutate, following
) -> None:
    p = await new_publisher()
    live = make_state(0)
    async with following("oldest_needed") as f:
        for seed in range(4):
            manifest = await p.put(live)
            published = {name: t.clone() for name, t in live.items()}
            for name, tensor in mutate(live, seed).items():
                live[name].copy_(tensor)  # in place, as an optimizer does
            await f.until_head(seed)
            assert manifest.sha256 == sha256_of(published) == await f.sha256(seed)


async def test_weights_that_are_not_contiguous_or_tied_are_published_as_what_they_hold(
    new_publisher, following
) -> None:
    p = await new_publisher()
    wide = torch.arange(12.0).reshape(3, 4)
    live = {"a": wide.t(), "b": wide, "c": wide[:, ::2]}
    first = await p.put(live)
    assert first.tensors == specs({n: t.contiguous() for n, t in live.items()})
    wide[1, 2] = -5.0
    second = await p.put(live)
    assert second.delta is not None
    assert second.tensors == specs({n: t.contiguous() for n, t in live.items()})
    async with following() as f:
        await f.until_head(1)
        assert await f.sha256(1) == sha256_of(live)


async def test_another_model_cannot_follow_in_the_same_run(new_publisher, make_state) -> None:
    p = await new_publisher()
    await p.put(make_state(0))
    with pytest.raises(WrongBase, match="wide"):
        await p.put(make_state(0) | {"wide": torch.zeros(9)})
    assert (await p.put(make_state(1))).version == 1


async def test_a_large_model_is_hashed_in_full_at_keyframes_only(
    run_of, new_bus, monkeypatch
) -> None:
    monkeypatch.setattr(stored_version, "SHA256_BYTES", 100)
    p = await run_of(5)
    assert [m.sha256 is not None for m in p.manifests] == [True] + 4 * [False]
    (record,) = (await read_log(new_bus())).keyframes
    assert record.sha256 == sha256_of(p.states[4])


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


async def test_a_restarted_publisher_without_the_heads_bytes_publishes_in_full(
    new_publisher, make_state
) -> None:
    await (await new_publisher()).put(make_state(0))
    q = await new_publisher()
    assert await q.publisher.publish_keyframe(reason="wanted") is None
    manifest = await q.put(make_state(1), previous_state=make_state(7))
    assert manifest.delta is None
    assert manifest.keyframe is not None
    assert (await q.put(make_state(2))).delta is not None


async def test_a_restarted_publisher_that_holds_the_head_makes_keyframes_and_deltas(
    new_publisher, make_state, mutate, new_bus
) -> None:
    state = make_state(0)
    first = await new_publisher()
    assert not await first.publisher.hold(state)
    await first.put(state)
    assert not await (await new_publisher()).publisher.hold(make_state(7))
    q = await new_publisher()
    assert await q.publisher.hold({name: t.clone() for name, t in state.items()})
    keyframe = await q.publisher.publish_keyframe(reason="wanted")
    assert keyframe is not None
    assert keyframe.version == 0
    assert (await q.put(mutate(state, 1))).delta is not None


async def test_a_keyframe_is_due_after_so_many_versions_also_across_a_restart(
    run_of, new_publisher, mutate
) -> None:
    p = await run_of(4)
    assert not p.publisher.keyframe_due
    q = await new_publisher()
    state = p.states[4]
    published = await q.publisher.publish(
        state,
        canary=p.manifests[0].canary,
        epoch=0,
        optimizer_steps=0,
        previous_state=p.states[3],
    )
    assert published.manifest.delta is not None
    assert q.publisher.keyframe_due
    assert (await q.publisher.publish_keyframe(reason="due")).version == 4
    assert not q.publisher.keyframe_due


async def test_a_keyframe_is_never_made_of_a_copy_that_is_not_the_head(run_of, new_bus) -> None:
    p = await run_of(3)
    base = p.publisher._base
    base.state["half.weight"][0, 0] += 1.0
    before = (await new_bus().stream_state("chunks")).last_seq
    with pytest.raises(Fatal, match="version 2: the publisher's copy has digest"):
        await p.publisher.publish_keyframe(reason="wanted")
    assert (await new_bus().stream_state("chunks")).last_seq == before
    assert (await read_log(new_bus())).keyframes == []


async def test_weights_that_changed_while_they_were_published_are_found_at_the_keyframe(
    new_publisher, make_state, new_bus
) -> None:
    live = make_state(0)

    class Meddling(MemoryBus):
        """Trains on while the manifest is being appended."""

        async def append(self, subject, payload, **options) -> int:
            if subject.endswith(".manifest.version"):
                live["wide"] += 1.0
            return await super().append(subject, payload, **options)

    p = await new_publisher(Meddling(Subjects("t"), new_bus().server))
    await p.put(live)
    live["wide"] += 1.0
    await p.put(live)
    with pytest.raises(Fatal, match="changed while they were published"):
        await p.publisher.publish_keyframe(reason="due")


async def test_a_version_waits_for_the_keyframe_that_is_being_made_of_its_base(
    run_of, new_bus, following
) -> None:
    p = await run_of(2)
    keyframe, _ = await asyncio.gather(p.publisher.publish_keyframe(reason="wanted"), p.more(1))
    assert (keyframe.version, keyframe.digest) == (1, p.manifests[1].digest)
    async with following() as f:
        await f.until_head(2)
        assert f.follower.resyncs == 0


async def test_a_keyframe_whose_upload_sweepers_may_have_taken_is_not_announced(
    new_publisher, make_state, new_bus
) -> None:
    now, step = [1000.0], [0.0]

    def clock() -> float:
        now[0] += step[0]
        return now[0]

    p = await new_publisher(clock=clock)
    await p.put(make_state(0))
    step[0] = ORPHAN_AGE_S
    with pytest.raises(BusUnavailable, match="too long"):
        await p.publisher.publish_keyframe(reason="wanted")
    assert (await read_log(new_bus())).keyframes == []


async def test_publishing_goes_on_after_a_cancelled_publication(run_of, new_bus, following) -> None:
    """Wherever it was cancelled: with and without the version having been stored."""
    p = await run_of(1)
    async with following("oldest_needed") as f:
        for awaits in range(0, 60, 3):
            state = p.states[-1]
            publishing = asyncio.create_task(p.put(state))
            for _ in range(awaits):
                await asyncio.sleep(0)
            publishing.cancel()
            await asyncio.gather(publishing, return_exceptions=True)
            await p.more(1)
        await f.until_head(p.publisher.head.version)
        assert f.follower.resyncs == 0
        assert await f.sha256(f.heads[-1]) == sha256_of(p.states[-2])
    versions = [v for v, _ in await _log(new_bus())]
    assert versions == list(range(len(versions)))


@pytest.mark.parametrize("where", ["bus", "store"])
async def test_orphans_are_swept_by_age_and_named_uploads_stay(
    run_of, new_publisher, faulty, server, following, tmp_path, where: str
) -> None:
    now = [1000.0]
    server.clock = lambda: now[0]
    store = KeyframeStore(str(tmp_path)) if where == "store" else None
    p = await run_of(5, faulty, clock=lambda: now[0], store=store)
    faulty.fault = "crash before"
    with pytest.raises(BusUnavailable):
        await p.more(1)
    if store is not None:
        store.put(f"{'0' * 32}-k", [b"of a dead publisher"])
        for path in tmp_path.glob("*/*"):
            os.utime(path, (now[0], now[0]))
    q = await new_publisher(clock=lambda: now[0], store=store)
    before = (await faulty.stream_state("chunks")).num_messages
    assert await q.publisher.sweep_orphans() == 0
    now[0] += ORPHAN_AGE_S
    assert await q.publisher.sweep_orphans() == (1 if store is None else 2)
    assert 0 < (await faulty.stream_state("chunks")).num_messages < before
    assert await q.publisher.sweep_orphans() == 0
    async with following("oldest_needed", store=store) as f:
        await f.until_head(4)
        assert f.follower.resyncs == 0
    async with following(store=store) as late:
        await late.until_head(4)
        assert late.follower.versions_applied == 1


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
