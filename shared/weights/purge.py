"""Dropping what nobody needs any more: manifests, chunks, keyframe files."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from shared.runtime.bus import Bus
from shared.runtime.errors import BusUnavailable
from shared.runtime.logs import Log
from shared.weights.fan_out import fan_out
from shared.weights.keyframe_store import KeyframeStore
from shared.weights.retention import KeyframePlace, PublishedLog


class Purge:
    """Carries out what `PublishedLog` allows."""

    def __init__(
        self, bus: Bus, store: KeyframeStore | None, first_seqs: dict[str, int], log: Log
    ) -> None:
        """Purge on `bus` and in `store`.

        Args:
            bus: where chunks and manifests are.
            store: where keyframes are, if not on the bus.
            first_seqs: upload id -> sequence of its first chunk, as far as it is known; what is
                looked up is added, what is purged is removed.
            log: ERROR per keyframe that is not there any more.
        """
        self._bus = bus
        self._store = store
        self._first_seqs = first_seqs
        self._log = log

    async def below(self, published: PublishedLog, oldest_needed: int) -> int | None:
        """Drop what is older than the newest intact keyframe at or below `oldest_needed`.

        Returns:
            The oldest version kept, None when nothing can go.

        Raises:
            BusError: the bus refused or did not answer; calling again is safe.
        """
        kept = await self._keeper(published, oldest_needed)
        if kept is None:
            return None
        needed = published.needed_uploads(kept.version)
        first_chunk = await self._first_chunk(sorted(needed))
        # Manifests first: a manifest without chunks would send followers searching.
        await self._bus.purge("manifests", published.seqs[kept.version])
        if first_chunk is not None:
            await self._bus.purge("chunks", first_chunk)
        for gone in self._first_seqs.keys() - needed:
            del self._first_seqs[gone]
        await self._delete(published.drop_below(kept.version))
        return kept.version

    async def _keeper(self, published: PublishedLog, oldest_needed: int) -> KeyframePlace | None:
        """Return the keyframe to keep, None when nothing older is there."""
        for place in published.keepers(oldest_needed):
            if place.version == min(published.seqs):
                return None
            if await self._is_intact(place):
                return place
            published.forget(place)
            self._log.error("keyframe_vanished", version=place.version, upload=place.upload_id)
        return None

    async def _is_intact(self, place: KeyframePlace) -> bool:
        if place.num_chunks:
            pattern = f"{self._bus.subjects.prefix}.chunk.{place.upload_id}.*"
            return len(await self._bus.subjects_of("chunks", pattern)) >= place.num_chunks
        if self._store is None:
            return False
        try:
            return place.upload_id in await asyncio.to_thread(self._store.list)
        except OSError as error:
            # Not to see a keyframe is not to know that it is gone.
            raise BusUnavailable(f"weights.keyframe_store: {error}") from error

    async def _first_chunk(self, uploads: list[str]) -> int | None:
        """Return the smallest sequence of the uploads' first chunks, None when none is there."""

        async def look_up(index: int) -> None:
            upload_id = uploads[index]
            if upload_id not in self._first_seqs:
                record = await self._bus.last(self._bus.subjects.chunk(upload_id, 0))
                if record is not None:
                    self._first_seqs[upload_id] = record.seq

        await fan_out(look_up, range(len(uploads)))
        found = [self._first_seqs[u] for u in uploads if u in self._first_seqs]
        return min(found, default=None)

    async def _delete(self, files: Iterable[KeyframePlace]) -> None:
        for place in files:
            if self._store is None:
                continue
            try:
                await asyncio.to_thread(self._store.delete, place.upload_id)
            except (OSError, ValueError) as error:
                # The sweep of orphans takes it later: no record names it any more.
                self._log.warning("keyframe_not_deleted", upload=place.upload_id, reason=str(error))
