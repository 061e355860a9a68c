"""The `partials` stream: what env agents hand in, and the learner's scores of it.

Consumes the stream on request; produces `PartialScores` and purges.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import aclosing

from services.learner.partials import PartialBook
from shared.runtime.bus import Record
from shared.runtime.context import Context
from shared.runtime.errors import BusError
from shared.wire.codec import decode, encode
from shared.wire.errors import WireError
from shared.wire.fencing import PartialScores, PartialTrajectory, TokenScores
from shared.wire.messages import Layout

_SCORES_PER_RECORD = 256


class PartialLog:
    """One learner process's view of the stream, folded into a book."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._bus = context.bus
        self._next = 1
        self.book = PartialBook()

    async def read(self, version: int | None) -> None:
        """Read to the stream's end; at the fence of `version`, count what comes too late."""
        last = (await self._bus.stream_state("partials")).last_seq
        if self._next > last:
            return
        async with aclosing(self._bus.read("partials", self._next)) as log:
            async for records in log:
                for record in records:
                    self._take(record, version)
                if self._next > last:
                    return

    async def append(
        self, scores: Sequence[TokenScores], *, version: int, digest: str, layout: Layout
    ) -> None:
        """Store scores of episodes that go on, before the step that leaves `version`."""
        for start in range(0, len(scores), _SCORES_PER_RECORD):
            record = PartialScores(
                version=version,
                digest=digest,
                scores=tuple(scores[start : start + _SCORES_PER_RECORD]),
                layout=layout,
                producer=self._context.pod,
            )
            seq = await self._bus.append(self._bus.subjects.partial_scores(version), encode(record))
            self.book.take_scores(record, seq)

    async def forget(self, open_tickets: Collection[str], version: int) -> None:
        """Drop what no open ticket needs after the fence of `version`."""
        self.book.keep_only(open_tickets, version)
        try:
            await self._bus.purge("partials", self.book.floor(self._next))
        except BusError as error:
            # What cannot be purged now is purged at the next fence.
            self._context.log.warning("purge_failed", reason=str(error))

    def _take(self, record: Record, version: int | None) -> None:
        self._next = record.seq + 1
        try:
            if record.subject.split(".")[-2] == "scores":
                self.book.take_scores(decode(record.payload, PartialScores), record.seq)
                return
            partial = decode(record.payload, PartialTrajectory)
        except WireError as error:
            # Its tokens stay without a score, which is counted when their terminal comes.
            self._context.count("unreadable_partials")
            self._context.log.warning("partial_unreadable", seq=record.seq, reason=str(error))
            return
        stamps = [span.version for sequence in partial.sequences for span in sequence.spans]
        if version is not None and max(stamps, default=-1) < version:
            self._context.count("late_partials")
        self.book.take_partial(partial, record.seq)
