"""Keyframes and deltas as chunks on the bus, under a random upload id."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterable, Iterable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Literal

import xxhash

from shared.runtime.bus import Bus
from shared.weights.cutting import Cutter, Piece, cut
from shared.weights.errors import ChunkGone, Corrupt
from shared.weights.fan_out import in_order
from shared.weights.spool import Spool
from shared.wire.weights import Artefact

WINDOW = 4
"""Chunks under way at once, each way; so many chunks an upload or a download holds in memory."""

_FIRST_POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class Uploaded:
    """An artefact whose chunks are stored."""

    artefact: Artefact
    first_seq: int
    """Of its first chunk on the chunk stream; all others come later."""


async def upload(
    bus: Bus,
    kind: Literal["keyframe", "delta"],
    pieces: Iterable[Piece] | AsyncIterable[Piece],
    *,
    upload_id: str,
    encoding: str,
    chunk_bytes: int,
    window: int = WINDOW,
) -> Uploaded:
    """Store the pieces in chunks, the first chunk before all others.

    Nobody sees the chunks before a manifest names them. Memory: `window` chunks, whatever the
    length of the whole.

    Args:
        bus: where to.
        kind: of the artefact.
        pieces: of any size. A sequence is there already and is taken in the event loop; any other
            iterable is expensive: it is advanced in a thread while earlier chunks are stored, is
            not touched any more once this has returned or raised, and a generator is closed.
        upload_id: never used before.
        encoding: of the artefact.
        chunk_bytes: size of all chunks but the last.
        window: appends under way at once.

    Raises:
        BusError: the bus refused a chunk, or did not answer.
    """
    # Above half of max_payload the bus would store the chunk as a blob: a detour.
    cutter = Cutter(max(1, min(chunk_bytes, bus.max_payload // 2)))
    num_chunks = 1

    async def store(chunk: tuple[int, bytes]) -> int:
        (index, data) = chunk
        subject = bus.subjects.chunk(upload_id, index)
        return await bus.append(subject, data, msg_id=f"{upload_id}.{index}")

    async with aclosing(_numbered(cut(cutter, pieces))) as chunks:
        # Retention purges the stream below a keyframe's first chunk: it must be the oldest.
        first_seq = await store(await anext(chunks))
        async with aclosing(in_order(store, chunks, window=window)) as stored:
            async for _ in stored:
                num_chunks += 1
    return Uploaded(
        Artefact(
            kind=kind,
            upload_id=upload_id,
            num_chunks=num_chunks,
            num_bytes=cutter.num_bytes,
            digest=cutter.digest.hexdigest(),
            encoding=encoding,
        ),
        first_seq,
    )


async def download(
    bus: Bus, artefact: Artefact, *, timeout_s: float, window: int = WINDOW
) -> AsyncGenerator[bytes, None]:
    """Yield the chunks of an artefact in order, fetched in parallel, at most `window` ahead.

    Length and digest are checked at the end: until this ends without an error, what it yielded
    may be wrong. Close it (`contextlib.aclosing`) when leaving the loop early.

    Args:
        bus: where from.
        artefact: what.
        timeout_s: how long to ask again for a chunk that is not there (a replica may lag).
        window: chunks under way or waiting for the consumer.

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

    async def fetch(index: int) -> bytes:
        subject = bus.subjects.chunk(artefact.upload_id, index)
        deadline = time.monotonic() + timeout_s
        pause = _FIRST_POLL_S
        while True:
            record = await bus.last(subject)
            if record is not None:
                return record.payload
            if time.monotonic() >= deadline:
                raise ChunkGone(subject)
            await asyncio.sleep(min(pause, max(0.0, deadline - time.monotonic())))
            pause *= 2

    check = Check(artefact)
    async with aclosing(in_order(fetch, range(artefact.num_chunks), window=window)) as chunks:
        async for chunk in chunks:
            check.feed(chunk)
            yield chunk
    check.close()


async def download_to(bus: Bus, artefact: Artefact, spool: Spool, *, timeout_s: float) -> None:
    """Write an artefact to `spool`; what is in it is wrong when this raises.

    Raises:
        ChunkGone, Corrupt, BusUnavailable: as `download`.
        OSError: the spool's disk is full.
    """
    async with aclosing(download(bus, artefact, timeout_s=timeout_s)) as chunks:
        async for chunk in chunks:
            spool.write(chunk)


class Check:
    """Length and digest of an artefact's bytes as they arrive."""

    def __init__(self, artefact: Artefact) -> None:
        self._artefact = artefact
        self._what = f"{artefact.kind} {artefact.upload_id}"
        self._num_bytes = 0
        self._digest = xxhash.xxh3_128()

    def feed(self, data: Piece) -> None:
        """Take the next piece.

        Raises:
            Corrupt: more bytes than there should be.
        """
        self._num_bytes += len(data)
        if self._num_bytes > self._artefact.num_bytes:
            raise Corrupt(
                self._what, f"{self._artefact.num_bytes} bytes", f"at least {self._num_bytes} bytes"
            )
        self._digest.update(data)

    def close(self) -> None:
        """End the artefact.

        Raises:
            Corrupt: these are not its bytes.
        """
        if self._num_bytes != self._artefact.num_bytes:
            raise Corrupt(
                self._what, f"{self._artefact.num_bytes} bytes", f"{self._num_bytes} bytes"
            )
        found = self._digest.hexdigest()
        if found != self._artefact.digest:
            raise Corrupt(self._what, f"xxh3 {self._artefact.digest}", f"xxh3 {found}")


async def _numbered(chunks: AsyncGenerator[bytes, None]) -> AsyncGenerator[tuple[int, bytes], None]:
    index = 0
    async with aclosing(chunks):
        async for chunk in chunks:
            yield index, chunk
            index += 1
