"""The same delta through a local file, and over the bus without the codec: what to compare with."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from shared.cli.bench_weights_models import State
from shared.runtime.bus import Bus
from shared.weights import deltas
from shared.weights.chunks import download_to, upload
from shared.weights.digests import specs, version_digest
from shared.weights.spool import Spool

CHUNK_BYTES = 1 << 20
CHUNK_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class LocalTimes:
    """Medians, seconds."""

    total_s: float
    """Diff, write, read, apply and verify."""
    transport_s: float
    """Write and read alone."""
    delta: bytes


def local_times(
    before: State, after: State, file: Path, threads: int, repetitions: int
) -> LocalTimes:
    """Bring `before` to `after` and back, through a file; one round does not count.

    The file is written while it is encoded, read as a whole, never synced to the disk.
    """
    data = b""
    totals: list[float] = []
    transports: list[float] = []
    tensors = specs(before)
    for repetition in range(repetitions + 1):
        started = time.perf_counter()
        with file.open("wb") as out:
            for piece in deltas.DeltaWriter(
                before, after, tensors=tensors, threads=threads
            ).pieces():
                out.write(piece)
        data = file.read_bytes()
        reader = deltas.DeltaReader(deltas.BytesSource(data))
        applied = deltas.apply(before, reader, tensors=tensors, threads=threads)
        assert version_digest(applied.tensors) == reader.target
        total = time.perf_counter() - started
        started = time.perf_counter()
        file.write_bytes(data)
        file.read_bytes()
        transport = time.perf_counter() - started
        deltas.apply(before, reader, reverse=True, tensors=applied.tensors, threads=threads)
        if repetition:
            totals.append(total)
            transports.append(transport)
    return LocalTimes(median(totals), median(transports), data)


async def transport_times(bus: Bus, data: bytes, repetitions: int) -> float:
    """Return the median seconds of bytes' way onto the bus and, after that, back."""
    times: list[float] = []
    for repetition in range(repetitions):
        started = time.perf_counter()
        uploaded = await upload(
            bus,
            "delta",
            [data],
            upload_id=f"transport-{repetition}",
            encoding=deltas.CODEC,
            chunk_bytes=CHUNK_BYTES,
        )
        spool = Spool()
        await download_to(bus, uploaded.artefact, spool, timeout_s=CHUNK_TIMEOUT_S)
        times.append(time.perf_counter() - started)
        spool.close()
    return median(times)
