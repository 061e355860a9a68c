"""The journal on the bus: a single writer, fenced by compare-and-set."""

from __future__ import annotations

import asyncio
import time
import uuid
from contextlib import aclosing

from services.learner.journal import JournalState
from shared.runtime.bus import Bus, Record
from shared.runtime.errors import Conflict, Fatal, Fenced
from shared.wire.codec import decode, encode
from shared.wire.errors import WireError
from shared.wire.journal import JournalBody, JournalEntry


class JournalLog:
    """Appends decisions and folds them into `state`, in that order."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._last_seq = 0
        self._writing = asyncio.Lock()
        self.state = JournalState()

    async def replay(self) -> int:
        """Fold everything written so far; return the number of entries.

        Raises:
            Fatal: an entry that this version of the code cannot read.
        """
        end = (await self._bus.stream_state("journal")).last_seq
        num_entries = 0
        if end == 0:
            return 0
        async with aclosing(self._bus.read("journal", 1)) as batches:
            async for records in batches:
                for record in records:
                    self._fold(record)
                num_entries += len(records)
                if self._last_seq >= end:
                    break
        return num_entries

    async def write(self, body: JournalBody) -> None:
        """Store a decision, then apply it to `state`.

        Raises:
            Fenced: another learner has written since.
        """
        # Whoever waits may be cancelled; what was sent may be stored, and must then be applied.
        await asyncio.shield(self._store(body))

    async def _store(self, body: JournalBody) -> None:
        async with self._writing:
            self._last_seq = await self._append(body)
            self.state.apply(body)

    def _fold(self, record: Record) -> None:
        try:
            entry = decode(record.payload, JournalEntry)
        except WireError as error:
            raise Fatal(f"journal entry {record.seq} cannot be read: {error}") from error
        self.state.apply(entry.body)
        self._last_seq = record.seq

    async def _append(self, body: JournalBody) -> int:
        entry = JournalEntry(entry_id=uuid.uuid4().hex, written_at=time.time(), body=body)
        subject = self._bus.subjects.journal
        try:
            return await self._bus.append(
                subject, encode(entry), expect_last_subject_seq=self._last_seq
            )
        except Conflict as conflict:
            # A lost acknowledgement looks the same as another writer: read back and compare.
            record = await self._bus.last(subject)
            if record and decode(record.payload, JournalEntry).entry_id == entry.entry_id:
                return record.seq
            raise Fenced(
                "another learner writes this run's journal: stop one of the two"
            ) from conflict
