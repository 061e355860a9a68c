"""Artefacts read from wherever they are, in bounded memory."""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import aclosing
from types import SimpleNamespace

import psutil
import pytest

from shared.weights import keyframe_store
from shared.weights.chunks import upload
from shared.weights.errors import ChunkGone, Corrupt
from shared.weights.keyframe_store import KeyframeStore, artefact_pieces

MB = 1024 * 1024


def new_id() -> str:
    return f"{uuid.uuid4().hex}-k"


def counted(num_bytes: int) -> bytes:
    return bytes(range(251)) * (num_bytes // 251) + bytes(num_bytes % 251)


def whole(store: KeyframeStore, artefact, piece_bytes: int = 64 * MB) -> bytes:
    return b"".join(bytes(piece) for piece in store.pieces(artefact, piece_bytes))


async def collect(bus, store, artefact, timeout_s: float = 0.0) -> bytes:
    found = artefact_pieces(bus, store, artefact, timeout_s=timeout_s)
    async with aclosing(found) as pieces:
        return b"".join([bytes(piece) async for piece in pieces])


async def test_an_artefact_is_read_from_where_it_says_it_is(place, new_bus) -> None:
    data = counted(5000)
    stored = place.store.put(new_id(), [data])
    uploaded = await upload(
        new_bus(), "keyframe", [data], upload_id="u", encoding="safetensors", chunk_bytes=999
    )
    assert await collect(new_bus(), place.store, stored) == data
    assert await collect(new_bus(), place.store, uploaded.artefact) == data
    assert await collect(new_bus(), None, uploaded.artefact) == data
    with pytest.raises(Corrupt, match=r"weights\.keyframe_store"):
        await collect(new_bus(), None, stored)


async def test_a_file_that_a_shared_folder_shows_late_is_waited_for_within_the_bound(
    local, tmp_path, new_bus
) -> None:
    artefact = local.put(new_id(), [counted(5000)])
    folder = tmp_path / "run" / artefact.upload_id
    folder.rename(tmp_path / "hidden")
    started = time.monotonic()
    with pytest.raises(ChunkGone):
        await collect(new_bus(), local, artefact, timeout_s=0.15)
    assert 0.15 <= time.monotonic() - started < 2.0
    reading = asyncio.ensure_future(collect(new_bus(), local, artefact, timeout_s=10.0))
    await asyncio.sleep(0.1)
    assert not reading.done()
    (tmp_path / "hidden").rename(folder)
    assert await reading == counted(5000)


async def test_a_store_that_hangs_is_given_up_while_the_loop_goes_on(
    local, new_bus, monkeypatch
) -> None:
    release = threading.Event()

    def hang(*_: object) -> Iterator[memoryview]:
        release.wait(20)
        yield memoryview(b"")

    monkeypatch.setattr(keyframe_store, "STALL_S", 0.1)
    artefact = local.put(new_id(), [b"x"])
    monkeypatch.setattr(local, "pieces", hang)
    reading = asyncio.ensure_future(collect(new_bus(), local, artefact, timeout_s=0.0))
    try:
        await asyncio.sleep(0.01)
        assert not reading.done()
        with pytest.raises(ChunkGone, match=r"nothing came for 0\.1 s"):
            await reading
    finally:
        release.set()


async def test_a_reader_that_leaves_early_leaves_no_thread_reading(local, new_bus) -> None:
    artefact = local.put(new_id(), [counted(3 * MB)])
    closed = 0

    def watched(*args) -> Iterator[memoryview]:
        nonlocal closed
        try:
            yield from KeyframeStore.pieces(local, *args, MB)
        finally:
            closed += 1

    reader = SimpleNamespace(pieces=watched)
    async with aclosing(artefact_pieces(new_bus(), reader, artefact, timeout_s=0.0)) as pieces:
        async for _ in pieces:
            break
    assert closed == 1


def _resident() -> int:
    return psutil.Process().memory_info().rss


def test_reading_a_local_file_never_holds_more_than_two_windows(local) -> None:
    """300 MB through windows of 64 MB: resident memory grows by less than 160 MB."""
    piece = counted(4 * MB)
    artefact = local.put(new_id(), (piece for _ in range(75)))
    before = _resident()
    peak = seen = 0
    for window in local.pieces(artefact):
        seen += len(window)
        peak = max(peak, _resident())
    assert seen == 300 * MB
    del window
    assert peak - before < 160 * MB
    assert _resident() - before < 16 * MB


@pytest.mark.parametrize(("kind", "size_mb", "bound_mb"), [("local", 300, 16), ("s3", 128, 112)])
def test_writing_and_reading_stay_below_a_bound_whatever_the_length(
    request, tmp_path, kind: str, size_mb: int, bound_mb: int
) -> None:
    """Resident memory: an object store takes parts of 32 MB and gives four ranges of 16 MB."""
    if kind == "local":
        store = KeyframeStore(str(tmp_path / "run"))
    else:
        store = KeyframeStore("s3://weights/memory", request.getfixturevalue("s3_server"))
        whole(store, store.put(new_id(), [b"warm"]))
    piece = counted(4 * MB)
    before = peak = _resident()

    def pieces() -> Iterator[bytes]:
        nonlocal peak
        for _ in range(size_mb // 4):
            peak = max(peak, _resident())
            yield piece

    artefact = store.put(new_id(), pieces())
    seen = 0
    for window in store.pieces(artefact, 4 * MB if kind == "local" else 64 * MB):
        seen += len(window)
        peak = max(peak, _resident())
    store.delete(artefact.upload_id)
    assert seen == artefact.num_bytes == size_mb * MB
    assert peak - before < bound_mb * MB
