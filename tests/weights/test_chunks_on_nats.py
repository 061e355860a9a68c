"""Chunks through a real nats-server: exactness, throughput, and what they cost other clients."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack

import psutil
import pytest

from shared.runtime.logs import Log
from shared.runtime.nats_bus import NatsBus, connect
from shared.runtime.sections import BusSection
from shared.weights.chunks import WINDOW, download, download_to, upload
from shared.weights.errors import ChunkGone
from shared.weights.orphans import sweep_orphans
from shared.weights.spool import Spool

MB = 1024 * 1024
CHUNK_BYTES = MB


@pytest.fixture
async def connected(subjects, nats_server) -> AsyncIterator[Callable[..., NatsBus]]:
    """Buses to the session's server; the run's chunks are dropped at the end."""
    async with AsyncExitStack() as stack:

        async def make() -> NatsBus:
            section = BusSection(url=nats_server.url, max_stream_bytes=1 << 30)
            bus = await connect(section, subjects, "t", Log("test"))
            stack.push_async_callback(bus.close)
            await bus.create_streams()
            return bus

        yield make
        await (await make()).purge("chunks", 1 << 40)


async def put(bus, pieces, upload_id: str = "u", chunk_bytes: int = CHUNK_BYTES):
    uploaded = await upload(
        bus, "keyframe", pieces, upload_id=upload_id, encoding="x", chunk_bytes=chunk_bytes
    )
    return uploaded.artefact


async def test_bytes_come_back_through_a_server(connected) -> None:
    data = os.urandom(5 * MB + 77)
    artefact = await put(await connected(), iter([data[:MB], data[MB:]]))
    spool = Spool(2 * MB)
    await download_to(await connected(), artefact, spool, timeout_s=0.0)
    assert spool.read(0, spool.size) == data
    spool.close()


async def test_a_missing_chunk_is_noticed_and_the_rest_is_swept(connected) -> None:
    bus = await connected()
    artefact = await put(bus, [os.urandom(3000)], chunk_bytes=1000)
    kept = await put(bus, [b"kept"], upload_id="kept")
    await bus.purge("chunks", 1 << 40, subject=bus.subjects.chunk("u", 0))
    with pytest.raises(ChunkGone, match=r"chunk\.u\.0"):
        async for _ in download(bus, artefact, timeout_s=0.1):
            pass
    assert await sweep_orphans(bus, None, named={"kept"}, older_than=time.time() + 60) == 1
    assert [chunk async for chunk in download(bus, kept, timeout_s=0.0)] == [b"kept"]
    assert (await bus.stream_state("chunks")).num_messages == 1


async def test_300_mb_pass_through_a_process_without_staying_in_it(connected) -> None:
    """Up and down with a spool of 4 MB: resident memory grows by less than 64 MB."""
    bus = await connected()
    piece = os.urandom(4 * MB)
    process = psutil.Process()
    before = peak = process.memory_info().rss

    def pieces() -> Iterator[bytes]:
        nonlocal peak
        for _ in range(75):
            peak = max(peak, process.memory_info().rss)
            yield piece

    artefact = await put(bus, pieces())
    spool = Spool(4 * MB)
    async for chunk in download(bus, artefact, timeout_s=0.0):
        spool.write(chunk)
        peak = max(peak, process.memory_info().rss)
    assert spool.size == 300 * MB
    spool.close()
    assert peak - before < 64 * MB


_UPLOADER = """
import asyncio, sys
from shared.runtime.logs import Log
from shared.runtime.nats_bus import connect
from shared.runtime.sections import BusSection
from shared.weights.chunks import upload
from shared.wire.subjects import Subjects

async def main(url, run, size):
    bus = await connect(BusSection(url=url), Subjects(run), "uploader", Log("test"))
    piece = bytes(range(256)) * (1 << 14)
    pieces = (piece for _ in range(int(size) // len(piece)))
    await upload(bus, "keyframe", pieces, upload_id="k", encoding="x", chunk_bytes=1 << 20)
    await bus.close()

asyncio.run(main(*sys.argv[1:]))
"""


async def small_appends(bus, done: Callable[[], bool]) -> list[float]:
    """Seconds that appends of 4 KB took while 200 MB of chunks arrived, sorted."""
    taken: list[float] = []
    while not done():
        started = time.perf_counter()
        await bus.append(bus.subjects.terminal(f"t{time.monotonic_ns()}"), bytes(4096))
        seconds = time.perf_counter() - started
        if (await bus.stream_state("chunks")).num_messages:
            taken.append(seconds)
        await asyncio.sleep(0.002)
    assert (await bus.stream_state("chunks")).num_bytes > 200 * MB
    assert len(taken) > 10
    return sorted(taken)


async def test_small_appends_of_others_keep_their_latency_during_a_keyframe(
    connected, nats_server, subjects
) -> None:
    """A trajectory of 4 KB is stored within a second, half of them within 50 ms, beside 200 MB.

    Two cores, otherwise idle: 0.4 ms in the middle, 20 ms at most (0.2 ms without the keyframe).
    """
    bus = await connected()
    uploader = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _UPLOADER, nats_server.url, subjects.run, str(200 * MB)
    )
    taken = await small_appends(bus, lambda: uploader.returncode is not None)
    assert uploader.returncode == 0
    assert taken[len(taken) // 2] < 0.05
    assert taken[-1] < 1.0


async def test_own_small_appends_keep_their_latency_during_a_keyframe(connected) -> None:
    """The same on the publisher's own connection, where they queue behind one window of chunks."""
    bus = await connected()
    piece = os.urandom(4 * MB)
    pieces = (piece for _ in range(50))
    uploading = asyncio.ensure_future(put(bus, pieces))
    taken = await small_appends(bus, uploading.done)
    await uploading
    assert taken[len(taken) // 2] < 0.1
    assert taken[-1] < 1.0


async def test_a_delta_of_10_mb_reaches_two_followers_in_a_fraction_of_a_second(connected) -> None:
    """0.05 s alone on two cores; the bound leaves room for a busy machine."""
    (publisher, *followers) = [await connected() for _ in range(3)]
    data = os.urandom(10 * MB)

    async def follow(bus, artefact) -> int:
        return sum([len(chunk) async for chunk in download(bus, artefact, timeout_s=0.0)])

    taken: list[float] = []
    for attempt in range(3):
        started = time.perf_counter()
        artefact = await put(publisher, [data], upload_id=f"d{attempt}")
        sizes = await asyncio.gather(*(follow(bus, artefact) for bus in followers))
        taken.append(time.perf_counter() - started)
        assert sizes == [10 * MB] * 2
    assert min(taken) < 0.3
    assert WINDOW * CHUNK_BYTES < 10 * MB  # it does not fit one window
