from __future__ import annotations

import asyncio
import threading
import time
import tracemalloc
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as some

from shared.runtime.errors import StreamFull
from shared.runtime.memory_bus import MemoryBus
from shared.runtime.memory_server import MemoryServer
from shared.weights.chunks import Uploaded, download, download_to, upload
from shared.weights.errors import ChunkGone, Corrupt
from shared.weights.spool import Spool
from shared.wire.subjects import Subjects

MB = 1024 * 1024


async def put(bus, pieces, *, upload_id: str = "u", chunk_bytes: int = 100, **kw) -> Uploaded:
    return await upload(
        bus, "delta", pieces, upload_id=upload_id, encoding="x", chunk_bytes=chunk_bytes, **kw
    )


async def whole(bus, artefact, *, timeout_s: float = 0.0, window: int = 4) -> bytes:
    async with aclosing(download(bus, artefact, timeout_s=timeout_s, window=window)) as chunks:
        return b"".join([chunk async for chunk in chunks])


def counted(num_chunks: int, size: int = 100) -> bytes:
    """No two chunks alike."""
    return b"".join(bytes([i]) * size for i in range(num_chunks))


@pytest.mark.parametrize("window", [1, 4])
@pytest.mark.parametrize("size", [0, 1, 99, 100, 101, 1050])
async def test_bytes_come_back_from_their_chunks(new_bus, size: int, window: int) -> None:
    data = bytes(i % 251 for i in range(size))
    up = await put(new_bus(), [data], window=window)
    artefact = up.artefact
    assert artefact.num_chunks == max(1, -(-size // 100))
    assert artefact.num_bytes == size
    assert artefact.digest == xxhash.xxh3_128_hexdigest(data)
    assert up.first_seq == 1
    assert await whole(new_bus(), artefact, window=window) == data
    spool = Spool(50)
    await download_to(new_bus(), artefact, spool, timeout_s=0.0)
    assert spool.read(0, spool.size) == data
    spool.close()


@given(pieces=some.lists(some.binary(max_size=30), max_size=12), size=some.integers(1, 40))
def test_chunks_do_not_depend_on_the_pieces_nor_on_how_they_come(pieces, size) -> None:
    data = b"".join(pieces)

    async def later() -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece

    async def run() -> None:
        bus = MemoryBus(Subjects("t"), MemoryServer())
        await bus.create_streams()
        forms = [pieces, iter(pieces), (memoryview(piece) for piece in pieces), later()]
        for number, form in enumerate(forms):
            up = await put(bus, form, upload_id=f"u{number}", chunk_bytes=size)
            for index in range(max(1, -(-len(data) // size))):
                record = await bus.last(bus.subjects.chunk(f"u{number}", index))
                assert record.payload == data[index * size : (index + 1) * size]
            assert up.artefact.num_bytes == len(data)
            assert await whole(bus, up.artefact) == data

    asyncio.run(run())


async def test_chunks_stay_below_the_detour_of_blobs(new_bus) -> None:
    bus = new_bus()
    up = await put(bus, [b"x" * bus.max_payload], chunk_bytes=1 << 30)
    assert up.artefact.num_chunks == 2
    assert (await bus.stream_state("blobs")).num_messages == 0


async def test_the_first_chunk_is_stored_before_all_others(new_bus) -> None:
    bus = new_bus()
    await bus.append(bus.subjects.chunk("older", 0), b"older")
    real, delays = bus.append, iter([0.02, 0.0, 0.01, 0.0])

    async def slow(*args, **kw) -> int:
        await asyncio.sleep(next(delays, 0.0))
        return await real(*args, **kw)

    bus.append = slow
    up = await put(bus, [counted(6)])
    first = await bus.get("chunks", up.first_seq)
    assert first.subject == bus.subjects.chunk("u", 0)
    assert up.first_seq == 2
    assert (await bus.stream_state("chunks")).num_messages == 7


async def test_an_upload_goes_on_after_lost_acknowledgements_without_storing_twice(
    new_bus, server
) -> None:
    server.lose_acks = 5
    up = await put(new_bus(), [counted(8)])
    assert (await new_bus().stream_state("chunks")).num_messages == 8
    assert await whole(new_bus(), up.artefact) == counted(8)


# --- what a download must notice


async def replaced(bus, index: int, data: bytes) -> None:
    await bus.append(bus.subjects.chunk("u", index), data)


async def test_a_changed_chunk_is_noticed(new_bus) -> None:
    up = await put(new_bus(), [counted(5)])
    await replaced(new_bus(), 1, b"b" * 100)
    with pytest.raises(Corrupt, match="xxh3"):
        await whole(new_bus(), up.artefact)


async def test_a_truncated_chunk_is_noticed(new_bus) -> None:
    up = await put(new_bus(), [counted(5)])
    await replaced(new_bus(), 1, b"\1" * 99)
    with pytest.raises(Corrupt, match="500 bytes, found 499 bytes"):
        await whole(new_bus(), up.artefact)


async def test_a_chunk_that_grew_is_noticed_as_soon_as_it_is_too_much(new_bus) -> None:
    up = await put(new_bus(), [counted(5)])
    await replaced(new_bus(), 1, b"\1" * 5000)
    seen: list[bytes] = []

    async def read() -> None:
        async for chunk in download(new_bus(), up.artefact, timeout_s=0.0):
            seen.append(chunk)  # noqa: PERF401 - what came before the error counts

    with pytest.raises(Corrupt, match="500 bytes, found at least"):
        await read()
    assert len(seen) == 1


async def test_reordered_chunks_are_noticed(new_bus) -> None:
    up = await put(new_bus(), [counted(5)])
    await replaced(new_bus(), 1, b"\2" * 100)
    await replaced(new_bus(), 2, b"\1" * 100)
    with pytest.raises(Corrupt, match="xxh3"):
        await whole(new_bus(), up.artefact)


async def test_a_chunk_in_the_place_of_another_is_noticed(new_bus) -> None:
    up = await put(new_bus(), [counted(5)])
    await replaced(new_bus(), 2, b"\1" * 100)
    with pytest.raises(Corrupt, match="xxh3"):
        await whole(new_bus(), up.artefact)


async def test_the_same_chunk_stored_twice_is_harmless(new_bus) -> None:
    up = await put(new_bus(), [counted(5)])
    await replaced(new_bus(), 1, b"\1" * 100)
    assert await whole(new_bus(), up.artefact) == counted(5)


async def test_a_missing_chunk_is_named_once_the_bound_is_over(new_bus) -> None:
    bus = new_bus()
    up = await put(bus, [counted(5)])
    await bus.purge("chunks", 1 << 40, subject=bus.subjects.chunk("u", 3))
    started = time.monotonic()
    with pytest.raises(ChunkGone, match=r"chunk\.u\.3"):
        await whole(bus, up.artefact, timeout_s=0.15)
    assert 0.15 <= time.monotonic() - started < 2.0


async def test_a_chunk_that_arrives_late_is_waited_for(new_bus) -> None:
    bus = new_bus()
    up = await put(bus, [counted(5)])
    await bus.purge("chunks", 1 << 40, subject=bus.subjects.chunk("u", 3))
    reading = asyncio.ensure_future(whole(bus, up.artefact, timeout_s=5.0))
    await asyncio.sleep(0.05)
    assert not reading.done()
    await replaced(bus, 3, b"\3" * 100)
    assert await reading == counted(5)


async def test_a_download_fails_at_once_though_chunks_before_are_still_under_way(new_bus) -> None:
    bus = new_bus()
    up = await put(bus, [counted(8)])
    await bus.purge("chunks", 1 << 40, subject=bus.subjects.chunk("u", 2))
    real = bus.last

    async def last(subject: str):
        if subject.endswith(".0"):
            await asyncio.sleep(60)
        return await real(subject)

    bus.last = last
    with pytest.raises(ChunkGone, match=r"chunk\.u\.2"):
        await whole(bus, up.artefact)
    assert len(asyncio.all_tasks()) == 1


async def test_an_absurd_number_of_chunks_is_refused_before_the_first_is_asked_for(new_bus) -> None:
    up = await put(new_bus(), [counted(5)])
    more = up.artefact.model_copy(update={"num_chunks": 6})
    with pytest.raises(ChunkGone, match=r"chunk\.u\.5"):
        await whole(new_bus(), more)
    absurd = up.artefact.model_copy(update={"num_chunks": 10**9})
    with pytest.raises(Corrupt, match="chunks"):
        await whole(new_bus(), absurd)


# --- bounds


async def test_a_download_looks_only_a_window_ahead_of_its_consumer(new_bus) -> None:
    bus = new_bus()
    up = await put(bus, [counted(40)])
    real, asked = bus.last, 0

    async def last(subject: str):
        nonlocal asked
        asked += 1
        return await real(subject)

    bus.last = last
    taken = 0
    async with aclosing(download(bus, up.artefact, timeout_s=0.0, window=4)) as chunks:
        async for _ in chunks:
            taken += 1
            await asyncio.sleep(0.001)
            assert asked <= taken + 4
    assert taken == asked == 40


async def test_making_pieces_overlaps_with_storing_them(new_bus) -> None:
    bus = new_bus()
    real, in_flight, overlaps, peak = bus.append, 0, 0, 0
    main = threading.get_ident()

    async def append(*args, **kw) -> int:
        nonlocal in_flight, peak
        in_flight += 1
        peak = max(peak, in_flight)
        await asyncio.sleep(0.005)
        in_flight -= 1
        return await real(*args, **kw)

    def pieces() -> Iterator[bytes]:
        nonlocal overlaps
        for index in range(30):
            assert threading.get_ident() != main
            time.sleep(0.001)
            overlaps += in_flight > 0
            yield bytes([index]) * 100

    bus.append = append
    up = await put(bus, pieces(), window=3)
    assert await whole(bus, up.artefact) == counted(30)
    assert overlaps >= 20
    assert 2 <= peak <= 3


async def test_the_event_loop_answers_while_pieces_are_made(new_bus) -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range(3):
            time.sleep(0.25)
            yield b"x" * 100

    uploading = asyncio.ensure_future(put(new_bus(), pieces()))
    worst = 0.0
    while not uploading.done():
        started = time.monotonic()
        await asyncio.sleep(0.001)
        worst = max(worst, time.monotonic() - started)
    assert worst < 0.2
    await uploading


@pytest.mark.parametrize("fail_at", [0, 1, 5])
async def test_an_error_while_making_pieces_is_raised_as_it_is(new_bus, fail_at: int) -> None:
    def pieces() -> Iterator[bytes]:
        for index in range(10):
            if index == fail_at:
                raise LookupError(index)
            yield b"x" * 100

    with pytest.raises(LookupError, match=str(fail_at)):
        await put(new_bus(), pieces())
    assert len(asyncio.all_tasks()) == 1


async def test_a_refusal_of_the_bus_ends_the_upload_and_closes_what_makes_the_pieces(
    new_bus, server
) -> None:
    closed, made = False, 0

    def pieces() -> Iterator[bytes]:
        nonlocal closed, made
        try:
            for _ in range(1000):
                made += 1
                yield b"x" * 100
        finally:
            closed = True

    server.streams[Subjects("t").stream("chunks")].max_bytes = 1000
    making = pieces()
    with pytest.raises(StreamFull):
        await put(new_bus(), making)
    assert closed
    assert made < 30
    assert len(asyncio.all_tasks()) == 1


async def test_a_cancelled_upload_no_longer_reads_what_it_published(new_bus) -> None:
    reading = closed = False

    def pieces() -> Iterator[bytes]:
        nonlocal reading, closed
        try:
            for _ in range(1000):
                reading = True
                time.sleep(0.05)
                reading = False
                yield b"x" * 100
        finally:
            closed = True

    uploading = asyncio.ensure_future(put(new_bus(), pieces()))
    while not reading:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    uploading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await uploading
    assert closed
    assert not reading


async def test_memory_is_bounded_by_the_window_whatever_the_length() -> None:
    """300 MB up and down, through a bus that keeps nothing: never more than 16 MB."""
    bus = MemoryBus(Subjects("t"), MemoryServer())
    await bus.create_streams()
    piece = bytes(3 * MB)
    stored = 0

    async def append(subject: str, payload: bytes, **_: object) -> int:
        nonlocal stored
        await asyncio.sleep(0)
        stored += len(payload)
        return 1

    async def last(subject: str):
        record = await MemoryBus.last(bus, bus.subjects.chunk("seed", 0))
        return record.__class__(1, subject, bytes(bytearray(record.payload)), 0.0)

    await bus.append(bus.subjects.chunk("seed", 0), bytes(MB))
    bus.append, bus.last = append, last
    tracemalloc.start()
    up = await put(bus, (piece for _ in range(100)), chunk_bytes=MB)
    assert stored == up.artefact.num_bytes == 300 * MB
    spool = Spool(4 * MB)
    await download_to(bus, up.artefact, spool, timeout_s=0.0)
    assert spool.size == 300 * MB
    (_, peak) = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    spool.close()
    assert peak < 16 * MB
