from __future__ import annotations

import asyncio
import os

import pytest

from shared.runtime.errors import BusUnavailable, Fatal
from shared.runtime.memory_bus import MemoryBus
from shared.weights.keyframe_store import KeyframeStore
from shared.weights.manifest_log import read_log
from shared.weights.orphans import ORPHAN_AGE_S
from shared.wire import codec
from shared.wire.subjects import Subjects


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


@pytest.mark.parametrize("fault", ["crash before", "crash after", "lost acknowledgement"])
async def test_a_keyframe_whose_append_failed_is_made_again_and_harms_nobody(
    run_of, faulty, following, fault: str
) -> None:
    p = await run_of(4, faulty)
    faulty.of, faulty.fault = ".manifest.keyframe", fault
    if fault == "lost acknowledgement":
        await p.more(1)
    else:
        with pytest.raises(BusUnavailable):
            await p.more(1)
        assert p.publisher.head.version == 4
        assert p.publisher.keyframe_due
        assert await p.publisher.publish_keyframe(reason="due") is not None
    assert not p.publisher.keyframe_due
    records = (await read_log(faulty)).keyframes
    assert len(records) == (1 if fault == "crash before" else 2)
    assert {record.version for record in records} == {4}
    assert await p.publisher.sweep_orphans(min_age_s=-60.0) == (fault == "crash before")
    async with following() as f:
        await f.until_head(4)
        assert (f.follower.resyncs, f.follower.versions_applied) == (0, 1)


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
