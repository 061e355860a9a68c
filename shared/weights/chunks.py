"""Keyframes and deltas as chunks on the bus, under a random upload id."""

from __future__ import annotations

import asyncio
import time
from typing import Literal

import xxhash

from shared.runtime.bus import Bus
from shared.weights.errors import ChunkGone, Corrupt
from shared.weights.fan_out import fan_out
from shared.wire.weights import Artefact

_FIRST_POLL_S = 0.02


async def upload(
    bus: Bus,
    kind: Literal["keyframe", "delta"],
    data: bytes,
    *,
    upload_id: str,
    encoding: str,
    chunk_bytes: int,
) -> Artefact:
    """Store `data` in chunks, the first one before all others; return its description.

    Nobody sees the chunks before a manifest names them; a repeated chunk is the same bytes.
    """
    # Above half of max_payload the bus would store the chunk as a blob: a detour.
    size = max(1, min(chunk_bytes, bus.max_payload // 2))
    count = max(1, -(-len(data) // size))

    async def store(index: int) -> int:
        return await bus.append(
            bus.subjects.chunk(upload_id, index),
            data[index * size : (index + 1) * size],
            msg_id=f"{upload_id}.{index}",
        )

    await store(0)  # retention purges the stream below a keyframe's first chunk
    await fan_out(store, range(1, count))
    return Artefact(
        kind=kind,
        upload_id=upload_id,
        num_chunks=count,
        num_bytes=len(data),
        digest=xxhash.xxh3_128_hexdigest(data),
        encoding=encoding,
    )


async def download(bus: Bus, artefact: Artefact, *, timeout_s: float) -> bytes:
    """Return the bytes of an artefact, fetched in parallel, length and digest checked.

    Args:
        bus: where to.
        artefact: what.
        timeout_s: how long to ask again for a chunk that is not there (a replica may lag).

    Raises:
        ChunkGone: a chunk was not there within `timeout_s`.
        Corrupt: the bytes are not those the manifest names.
        BusUnavailable: no answer within the bus's own bound.
    """
    what = f"{artefact.kind} {artefact.upload_id}"
    if artefact.num_chunks > max(1, artefact.num_bytes):
        raise Corrupt(
            what, f"<= {artefact.num_bytes} chunks", f"{artefact.num_chunks} in the manifest"
        )
    deadline = time.monotonic() + timeout_s

    async def fetch(index: int) -> bytes:
        subject = bus.subjects.chunk(artefact.upload_id, index)
        pause = _FIRST_POLL_S
        while True:
            record = await bus.last(subject)
            if record is not None:
                return record.payload
            if time.monotonic() >= deadline:
                raise ChunkGone(subject)
            await asyncio.sleep(min(pause, max(0.0, deadline - time.monotonic())))
            pause *= 2

    data = b"".join(await fan_out(fetch, range(artefact.num_chunks)))
    if len(data) != artefact.num_bytes:
        raise Corrupt(what, f"{artefact.num_bytes} bytes", f"{len(data)} bytes")
    found = xxhash.xxh3_128_hexdigest(data)
    if found != artefact.digest:
        raise Corrupt(what, f"xxh3 {artefact.digest}", f"xxh3 {found}")
    return data
