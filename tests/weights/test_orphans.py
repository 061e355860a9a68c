"""Sweeping uploads that nobody names, on the bus and in a store of files."""

from __future__ import annotations

import asyncio
import os
import time
import uuid

import pytest

from shared.runtime.errors import BusUnavailable, StreamFull
from shared.weights import publisher
from shared.weights.artefact_writer import ArtefactWriter
from shared.weights.chunks import download, upload
from shared.weights.keyframe_store import KeyframeStore
from shared.weights.orphans import sweep_orphans


class Clock:
    """Stored times, in seconds; set before an upload."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(server) -> Clock:
    clock = Clock()
    server.clock = clock
    return clock


async def put(bus, upload_id: str, num_chunks: int = 3):
    uploaded = await upload(
        bus,
        "delta",
        [upload_id.encode()[:1] * (100 * num_chunks)],
        upload_id=upload_id,
        encoding="x",
        chunk_bytes=100,
    )
    return uploaded.artefact


async def uploads(bus) -> set[str]:
    subjects = await bus.subjects_of("chunks", f"{bus.subjects.prefix}.chunk.*.*")
    return {subject.split(".")[-2] for subject in subjects}


async def test_only_what_is_old_and_named_by_nobody_goes(new_bus, clock) -> None:
    bus = new_bus()
    kept = await put(bus, "named", 5)
    await put(bus, "lost")
    clock.now = 2000.0
    await put(bus, "young")
    assert await sweep_orphans(bus, None, named={"named"}, older_than=1500.0) == 1
    assert await uploads(bus) == {"named", "young"}
    assert b"".join([c async for c in download(bus, kept, timeout_s=0.0)]) == b"n" * 500
    assert await sweep_orphans(bus, None, named={"named"}, older_than=1500.0) == 0


async def test_nothing_goes_when_not_all_names_could_be_read(new_bus, clock, tmp_path) -> None:
    bus, store = new_bus(), KeyframeStore(str(tmp_path))
    await put(bus, "lost")
    artefact = store.put(uuid.uuid4().hex, [b"lost"])
    assert await sweep_orphans(bus, store, named=None, older_than=time.time() + 1e6) == 0
    assert await uploads(bus) == {"lost"}
    assert set(store.list()) == {artefact.upload_id}


async def test_an_upload_that_began_long_ago_stays_while_chunks_still_arrive(
    new_bus, clock
) -> None:
    bus = new_bus()
    await put(bus, "slow", 2)
    clock.now = 2000.0
    await bus.append(bus.subjects.chunk("slow", 2), b"x")
    assert await sweep_orphans(bus, None, named=set(), older_than=1500.0) == 0
    assert await sweep_orphans(bus, None, named=set(), older_than=2000.0) == 1
    assert await uploads(bus) == set()


async def test_an_upload_whose_first_chunks_are_gone_is_swept_too(new_bus, clock) -> None:
    bus = new_bus()
    await put(bus, "half", 12)
    await bus.purge("chunks", 5)
    assert bus.subjects.chunk("half", 0) not in await bus.subjects_of(
        "chunks", f"{bus.subjects.prefix}.chunk.half.*"
    )
    assert await sweep_orphans(bus, None, named=set(), older_than=1500.0) == 1
    assert await uploads(bus) == set()


async def test_sweeping_reads_one_chunk_of_each_upload_that_is_not_named(new_bus, clock) -> None:
    bus = new_bus()
    for name in ("named", "lost", "also-lost"):
        await put(bus, name, 20)
    real, read = bus.last, []

    async def last(subject: str):
        read.append(subject.removeprefix(f"{bus.subjects.prefix}.chunk."))
        return await real(subject)

    bus.last = last
    assert await sweep_orphans(bus, None, named={"named"}, older_than=1500.0) == 2
    assert sorted(read) == ["also-lost.19", "lost.19"]


async def test_a_chunk_appended_while_sweeping_stays(new_bus, clock) -> None:
    bus = new_bus()
    await put(bus, "back", 2)
    real = bus.last

    async def last(subject: str):
        record = await real(subject)
        clock.now = 2000.0
        await bus.append(bus.subjects.chunk("back", 2), b"x")
        return record

    bus.last = last
    await sweep_orphans(bus, None, named=set(), older_than=1500.0)
    assert await bus.subjects_of("chunks", f"{bus.subjects.prefix}.chunk.*.*") == [
        bus.subjects.chunk("back", 2)
    ]


async def test_files_are_swept_by_the_same_rule_and_counted_once(new_bus, clock, tmp_path) -> None:
    bus, store = new_bus(), KeyframeStore(str(tmp_path))
    names = [uuid.uuid4().hex for _ in range(3)]
    for name in names:
        store.put(name, [b"x"])
    (named, lost, _) = names
    for name in (named, lost):
        os.utime(tmp_path / name / "model.safetensors", (1000.0, 1000.0))
    unfinished = uuid.uuid4().hex
    (tmp_path / unfinished).mkdir()
    part = tmp_path / unfinished / ".model.safetensors.part"
    part.write_bytes(b"half")
    os.utime(part, (1000.0, 1000.0))
    await put(bus, lost)  # the same upload on the bus and in the store is one
    assert await sweep_orphans(bus, store, named={named}, older_than=1500.0) == 2
    assert set(store.list()) == {named, names[2]}
    assert not (tmp_path / unfinished).exists()


async def test_a_store_that_cannot_be_listed_is_an_error_after_the_bus_was_swept(
    new_bus, clock, tmp_path, monkeypatch
) -> None:
    bus, store = new_bus(), KeyframeStore(str(tmp_path))
    await put(bus, "lost")

    def fails() -> dict[str, float]:
        raise PermissionError("the bucket")

    monkeypatch.setattr(store, "list", fails)
    with pytest.raises(PermissionError):
        await sweep_orphans(bus, store, named=set(), older_than=1500.0)
    assert await uploads(bus) == set()


async def test_a_bus_that_does_not_answer_is_not_an_empty_one(new_bus, server, clock) -> None:
    bus = new_bus()
    await put(bus, "lost")
    server.set_up(False)
    with pytest.raises(BusUnavailable):
        await sweep_orphans(bus, None, named=set(), older_than=1500.0)


async def test_a_keyframe_that_does_not_fit_leaves_no_chunks_behind(new_bus, make_state) -> None:
    bus = new_bus()
    full = StreamFull("chunks")
    append, stored = bus.append, []

    async def fill_up(subject: str, payload: bytes, **options: object) -> int:
        if ".chunk." in subject and len(stored) >= 3:
            raise full
        stored.append(subject)
        return await append(subject, payload, **options)

    bus.append = fill_up
    with pytest.raises(StreamFull):
        await ArtefactWriter(bus, None, 200).keyframe("ab" * 16, make_state(0))
    assert len(stored) == 3
    assert await bus.subjects_of("chunks", f"{bus.subjects.prefix}.chunk.*.*") == []


async def test_what_a_bus_that_went_away_holds_of_an_upload_is_left_to_the_sweep(
    new_bus, make_state
) -> None:
    bus = new_bus()
    gone = BusUnavailable("no bus for 60 s")
    append, stored = bus.append, []

    async def go_away(subject: str, payload: bytes, **options: object) -> int:
        if ".chunk." in subject and len(stored) >= 3:
            raise gone
        stored.append(subject)
        return await append(subject, payload, **options)

    async def never(*args: object, **options: object) -> None:
        pytest.fail("waited for a bus that is away")

    bus.append = go_away
    bus.stream_state = bus.purge = never
    with pytest.raises(BusUnavailable) as caught:
        await ArtefactWriter(bus, None, 200).keyframe("ab" * 16, make_state(0))
    assert caught.value is gone
    assert len(await bus.subjects_of("chunks", f"{bus.subjects.prefix}.chunk.*.*")) == 3


async def test_an_upload_that_lands_while_the_log_is_read_is_spared(
    run_of, new_bus, server, monkeypatch
) -> None:
    """The sweep reads the log, then judges: what was named in between is in neither list."""
    p = await run_of(2)
    real = publisher.read_named_uploads

    async def while_publishing(bus):
        named = await real(bus)
        await release()
        return named

    async def release() -> None:
        gate.set()
        await uploading

    gate = asyncio.Event()
    append = type(p.publisher._bus).append

    async def hold_manifest(self, subject, payload, **options):
        if ".chunk." in subject:
            started.set()
            await gate.wait()
        return await append(self, subject, payload, **options)

    started = asyncio.Event()
    monkeypatch.setattr(type(p.publisher._bus), "append", hold_manifest)
    monkeypatch.setattr(publisher, "read_named_uploads", while_publishing)
    uploading = asyncio.create_task(p.publisher.publish_keyframe(reason="wanted"))
    await started.wait()
    await p.publisher.sweep_orphans(min_age_s=-60.0)
    keyframe = uploading.result()
    chunks = await new_bus().subjects_of(
        "chunks", f"{new_bus().subjects.prefix}.chunk.{keyframe.artefact.upload_id}.*"
    )
    assert len(chunks) == keyframe.artefact.num_chunks
