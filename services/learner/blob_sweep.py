"""Large payloads whose message is gone: purged with it, or left by a crash before it was stored."""

from __future__ import annotations

from shared.runtime.bus import Bus
from shared.weights.fan_out import fan_out
from shared.wire.subjects import STREAMS, StreamName

_WINDOW = 16

POINTING: tuple[StreamName, ...] = tuple(
    spec.name for spec in STREAMS if spec.name not in ("blobs", "chunks")
)
"""Streams whose messages may point at a blob; chunks of weights are never that large."""


class BlobSweep:
    """Drops blobs that no stored message points at; each message is looked at once."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._next: dict[StreamName, int] = {}
        """First sequence not looked at yet."""
        self._pointers: dict[StreamName, dict[int, str]] = {name: {} for name in POINTING}
        """Sequence -> digest."""

    async def sweep(self, older_than: float) -> int:
        """Drop what nothing points at and was last stored before `older_than`; return how many.

        Without any blob this is one request.

        Args:
            older_than: Unix seconds. A pointer is stored right after its blob: whoever takes longer
                than until then to store it finds its message pointing at nothing.

        Raises:
            BusError: the bus refused or did not answer; calling again is safe.
        """
        prefix = f"{self._bus.subjects.prefix}.blob."
        chunks: dict[str, int] = {}
        for subject in await self._bus.subjects_of("blobs", f"{prefix}*.*"):
            digest, _, index = subject.removeprefix(prefix).partition(".")
            chunks[digest] = max(int(index), chunks.get(digest, 0))
        if not chunks:
            return 0
        # Before anything is judged: what is stored from now on stays.
        end = (await self._bus.stream_state("blobs")).last_seq + 1
        for name in POINTING:
            await self._look_through(name)
        pointed_at = {digest for found in self._pointers.values() for digest in found.values()}
        dropped = 0
        for digest in sorted(chunks.keys() - pointed_at):
            record = await self._bus.last(self._bus.subjects.blob(digest, chunks[digest]))
            if record is not None and record.stored_at <= older_than:
                await self._bus.purge("blobs", end, subject=f"{prefix}{digest}.*")
                dropped += 1
        return dropped

    async def _look_through(self, name: StreamName) -> None:
        """Take in the pointers of new messages, forget those of purged ones."""
        state = await self._bus.stream_state(name)
        start = max(self._next.get(name, 1), state.first_seq)
        found = self._pointers[name]
        for seq in [seq for seq in found if seq < state.first_seq]:
            del found[seq]

        async def look(seq: int) -> str | None:
            return await self._bus.blob_of(name, seq)

        unseen = range(start, state.last_seq + 1)
        for seq, digest in zip(unseen, await fan_out(look, unseen, window=_WINDOW), strict=True):
            if digest is not None:
                found[seq] = digest
        self._next[name] = state.last_seq + 1
