from __future__ import annotations

import asyncio

import pytest

from shared.runtime.errors import BusUnavailable
from shared.runtime.memory_bus import MemoryBus
from shared.weights.keyframe_store import KeyframeStore
from shared.weights.manifest_log import read_log
from shared.wire.codec import encode
from shared.wire.subjects import Subjects
from shared.wire.weights import Keyframe


async def _versions(bus) -> list[int]:
    return [entry.manifest.version for entry in (await read_log(bus)).manifests]


async def _uploads(bus) -> set[str]:
    """Upload ids that have chunks."""
    subjects = await bus.subjects_of("chunks", f"{bus.subjects.prefix}.chunk.*.*")
    return {subject.split(".")[-2] for subject in subjects}


async def _named_on_bus(bus) -> set[str]:
    log = await read_log(bus)
    manifests = [entry.manifest for entry in log.manifests]
    artefacts = [a for m in manifests for a in (m.delta, m.keyframe) if a is not None]
    artefacts += [k.artefact for k in log.keyframes]
    return {a.upload_id for a in artefacts if a.num_chunks}


async def test_the_keyframe_at_or_below_the_mark_and_all_after_it_stay(
    run_of, new_bus, new_publisher, following
) -> None:
    p = await run_of(11)
    bus = new_bus()
    assert await p.publisher.purge_below(3) is None
    assert await p.publisher.purge_below(7) == 4
    assert await p.publisher.purge_below(7) is None
    assert await _versions(bus) == list(range(4, 11))
    needed = {p.manifests[v].delta.upload_id for v in range(5, 11)}
    needed |= {k.artefact.upload_id for k in (await read_log(bus)).keyframes}
    assert await _uploads(bus) == needed
    async with following("oldest_needed") as f:
        await f.until_head(10)
        assert f.versions == list(range(4, 11))
        assert await f.sha256(7) == p.manifests[7].sha256
        assert f.follower.resyncs == 0
    await p.more(1)
    q = await new_publisher()
    assert await q.publisher.purge_below(8) == 8
    assert await q.publisher.manifest(7) is None
    assert (await q.publisher.manifest(9)).version == 9
    assert await _versions(bus) == [8, 9, 10, 11]


async def test_files_of_dropped_versions_are_deleted_and_others_stay(
    run_of, new_bus, tmp_path, following
) -> None:
    store = KeyframeStore(str(tmp_path))
    p = await run_of(10, store=store)
    files = {k.version: k.artefact.upload_id for k in (await read_log(new_bus())).keyframes}
    first = p.manifests[0].keyframe.upload_id
    assert set(store.list()) == {first, files[4], files[8]}
    assert await p.publisher.purge_below(9) == 8
    assert set(store.list()) == {files[8]}
    assert await _uploads(new_bus()) == {p.manifests[9].delta.upload_id}
    async with following("oldest_needed", store=store) as f:
        await f.until_head(9)
        assert f.versions == [8, 9]


async def test_a_file_that_cannot_be_deleted_is_left_to_the_sweep_of_orphans(
    run_of, tmp_path, monkeypatch
) -> None:
    store = KeyframeStore(str(tmp_path))
    p = await run_of(5, store=store)

    def refuse(self, upload_id: str) -> None:
        raise OSError("read-only file system")

    with monkeypatch.context() as broken:
        broken.setattr(KeyframeStore, "delete", refuse)
        assert await p.publisher.purge_below(4) == 4
    assert len(store.list()) == 2
    assert await p.publisher.sweep_orphans(min_age_s=-60.0) >= 1
    assert len(store.list()) == 1


@pytest.mark.parametrize("where", ["bus", "store"])
async def test_a_keyframe_that_vanished_is_no_base_to_rely_on_and_is_due_again(
    run_of, new_bus, server, tmp_path, where: str
) -> None:
    store = KeyframeStore(str(tmp_path)) if where == "store" else None
    p = await run_of(6, store=store)
    (record,) = (await read_log(new_bus())).keyframes
    if store is None:
        stream = server.streams[Subjects("t").stream("chunks")]
        subject = Subjects("t").chunk(record.artefact.upload_id, 1)
        stream.remove(stream.by_subject[subject])
    else:
        store.delete(record.artefact.upload_id)
    assert not p.publisher.keyframe_due
    assert await p.publisher.purge_below(5) is None
    assert await _versions(new_bus()) == list(range(6))
    assert p.publisher.keyframe_due
    await p.publisher.publish_keyframe(reason="due")
    assert await p.publisher.purge_below(5) == 5


@pytest.mark.parametrize("where", ["bus", "store"])
async def test_what_an_upload_in_progress_has_stored_is_never_purged(
    run_of, server, tmp_path, following, where: str
) -> None:
    class Purging(MemoryBus):
        """Purges as much as it may before every chunk, as a learner's timer could."""

        purge_all = None

        async def append(self, subject, payload, **options) -> int:
            if ".chunk." in subject and self.purge_all is not None:
                await self.purge_all()
            return await super().append(subject, payload, **options)

    bus = Purging(Subjects("t"), server)
    store = KeyframeStore(str(tmp_path)) if where == "store" else None
    p = await run_of(1, bus, keyframe_every=1, store=store)
    purged: list[int | None] = []

    async def purge_all() -> None:
        purged.append(await p.publisher.purge_below(p.publisher.head.version))

    bus.purge_all = purge_all
    async with following("newest", store=store) as f:
        for _ in range(4):
            await p.more(1)
            await f.until_head(p.publisher.head.version)
        assert f.follower.resyncs == 0
    assert {1, 2, 3} <= set(purged)
    async with following("oldest_needed", store=store) as f:
        await f.until_head(4)
    assert await _named_on_bus(bus) <= await _uploads(bus)


async def test_a_keyframe_record_of_a_purged_version_is_ignored(
    run_of, new_bus, new_publisher, following
) -> None:
    p = await run_of(5)
    await p.publisher.purge_below(4)
    stale = Keyframe(
        version=2,
        artefact=p.manifests[0].keyframe,
        digest=p.manifests[2].digest,
        sha256="0" * 64,
        published_at=0.0,
        producer="stalled",
    )
    await new_bus().append(Subjects("t").keyframe, encode(stale))
    q = await new_publisher()
    assert await q.publisher.purge_below(3) is None
    async with following("oldest_needed") as f:
        await f.until_head(4)
        assert f.versions == [4]
        assert f.follower.resyncs == 0


async def test_a_purge_that_the_bus_did_not_answer_is_done_again(run_of, server) -> None:
    bus = MemoryBus(Subjects("t"), server, retry_s=0.05)
    p = await run_of(9, bus)
    original = server.purge

    def once(*args) -> None:
        server.purge = original
        server.set_up(False)
        original(*args)

    server.purge = once
    with pytest.raises(BusUnavailable):
        await p.publisher.purge_below(8)
    server.set_up(True)
    await asyncio.sleep(0)
    assert await p.publisher.purge_below(8) == 8
    assert await _versions(bus) == [8]
    assert await _uploads(bus) == await _named_on_bus(bus)
