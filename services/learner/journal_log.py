"""The journal on the bus: a single writer, fenced by compare-and-set."""

from __future__ import annotations

import time
import uuid

from services.learner.journal import JournalState
from shared.runtime.bus import Bus
from shared.runtime.errors import Conflict, Fatal, Fenced
from shared.wire.codec import decode, encode
from shared.wire.errors import WireError
from shared.wire.journal import JournalBody, JournalEntry


class JournalLog:
    """Appends decisions and folds them into `state`, in that order."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._last_seq = 0
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
        async for records in self._bus.read("journal", 1):
            for record in records:
                try:
                    entry = decode(record.payload, JournalEntry)
                except WireError as error:
                    raise Fatal(f"journal entry {record.seq} cannot be read: {error}") from error
                self.state.apply(entry.body)
                self._last_seq = record.seq
                num_entries += 1
            if self._last_seq >= end:
                break
        return num_entries

    async def write(self, body: JournalBody) -> None:
        """Store a decision, then apply it to `state`.

        Raises:
            Fenced: another learner has written since.
        """
        entry = JournalEntry(entry_id=uuid.uuid4().hex, written_at=time.time(), body=body)
        subject = self._bus.subjects.journal
        try:
            self._last_seq = await self._bus.append(
                subject, encode(entry), expect_last_subject_seq=self._last_seq
            )
        except Conflict as conflict:
            # A lost acknowledgement looks the same as another writer: read back and compare.
            record = await self._bus.last(subject)
            stored = decode(record.payload, JournalEntry) if record else None
            if record is None or stored is None or stored.entry_id != entry.entry_id:
                raise Fenced(
                    "another learner writes this run's journal: stop one of the two"
                ) from conflict
            self._last_seq = record.seq
        self.state.apply(body)
