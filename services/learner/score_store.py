"""Scores that the learner computed itself, put on the log: an audit rescores what was trained.

Stored after the step, off the critical path; a learner that dies before it is done executes the
batch again from its checkpoint, and stores them then.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

import torch

from services.learner.staging import Scored
from shared.backends.base import Backend
from shared.backends.trajectory_scoring import LayoutKind
from shared.runtime.context import Context
from shared.runtime.errors import Conflict
from shared.wire.codec import decode, encode
from shared.wire.messages import Layout, Score, SequenceScore

_WINDOW = 32
"""Appends in flight."""


class ScoreStore:
    """Appends to `score.<ticket>`, where an oracle would."""

    def __init__(self, context: Context, backend: Backend, kind: LayoutKind) -> None:
        self._context = context
        self._layout = Layout(
            backend=backend.name,
            dtype=str(backend.dtype).removeprefix("torch."),
            kind=kind,
            num_threads=torch.get_num_threads(),
        )

    async def store(
        self, members: Sequence[Scored], scores: Mapping[str, tuple[SequenceScore, ...]]
    ) -> int:
        """Store what a batch was trained on; return the highest sequence it has on the log."""
        window = asyncio.Semaphore(_WINDOW)

        async def store(member: Scored) -> int:
            async with window:
                return await self._store(member, scores[member.ticket_id])

        async with asyncio.TaskGroup() as group:
            stored = [group.create_task(store(member)) for member in members]
        return max((one.result() for one in stored), default=0)

    async def _store(self, member: Scored, sequences: tuple[SequenceScore, ...]) -> int:
        bus = self._context.bus
        subject = bus.subjects.score(member.ticket_id)
        score = Score(
            ticket_id=member.ticket_id,
            terminal_seq=member.terminal_seq,
            terminal_digest=member.terminal_digest,
            sequences=sequences,
            layout=self._layout,
            producer=self._context.pod,
        )
        try:
            return await bus.append(subject, encode(score), expect_last_subject_seq=0)
        except Conflict:
            stored = await bus.last(subject)
            if stored is None:
                raise
            if decode(stored.payload, Score).sequences == sequences:
                self._context.count("adopted_scores")  # of this batch's first execution
            else:
                self._context.count("foreign_scores")
                self._context.log.warning("score_not_stored", ticket_id=member.ticket_id)
            return stored.seq
