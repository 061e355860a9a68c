"""`oracle` as a shadow: the scores that an oracle happens to have stored by now.

The learner does not wait for them, since that would change what is trained: a trajectory without
its score has no exact answer at this step, and is counted as unanswered.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence

from services.learner.routes.base import OldLogprobs, RouteBase, RouteCost
from services.learner.score_records import score_event
from services.learner.staging import ScoreArrived, Scored
from shared.runtime.errors import BusError
from shared.wire.codec import decode
from shared.wire.errors import WireError
from shared.wire.messages import Score, SequenceScore

_WINDOW = 32
"""Look-ups in flight."""


class StoredScores(RouteBase):
    """Joins scores as they were read, and looks up the ones an earlier process had read."""

    name = "oracle"
    exact = True

    async def start(self) -> None:
        self._read: dict[str, ScoreArrived] = {}
        self._asked: set[str] = set()
        """Looked up without finding anything: what comes later is read."""

    def take(self, event: ScoreArrived) -> None:
        """Note a stored score."""
        if event.sequences:
            self._read[event.ticket_id] = event

    def forget(self, open_tickets: Collection[str]) -> None:
        """Drop the scores of tickets that are no longer open."""
        self._read = {t: e for t, e in self._read.items() if t in open_tickets}
        self._asked &= set(open_tickets)

    async def at_step(self, members: Sequence[Scored], version: int) -> OldLogprobs:
        unread = [m for m in members if m.ticket_id not in self._read | dict.fromkeys(self._asked)]
        window = asyncio.Semaphore(_WINDOW)
        async with asyncio.timeout(self._context.section.shadow_timeout_s):
            await asyncio.gather(*(self._look_up(m.ticket_id, window) for m in unread))
        found = {m.ticket_id: self._of(m) for m in members}
        return OldLogprobs({t: scores for t, scores in found.items() if scores}, RouteCost())

    def _of(self, member: Scored) -> tuple[SequenceScore, ...]:
        event = self._read.get(member.ticket_id)
        wanted = (member.terminal_seq, member.terminal_digest)
        if event is None or (event.terminal_seq, event.terminal_digest) != wanted:
            return ()
        return event.sequences

    async def _look_up(self, ticket_id: str, window: asyncio.Semaphore) -> None:
        async with window:
            self._asked.add(ticket_id)
            try:
                record = await self._context.bus.last(self._context.bus.subjects.score(ticket_id))
                if record is not None:
                    self.take(score_event(decode(record.payload, Score), record.seq))
            except (BusError, WireError) as error:
                self._context.log.debug("score_not_read", ticket_id=ticket_id, reason=str(error))
