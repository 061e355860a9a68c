"""`oracle`: a dedicated service scores every token under its own version (exact, the default)."""

from __future__ import annotations

from collections.abc import Sequence

from services.learner.staging import ScoreArrived, Scored
from shared.backends.base import Backend
from shared.wire.base import Message
from shared.wire.messages import Score, SequenceScore


class OracleRoute:
    """Joins what logit_oracle stored; costs nothing on the learner's critical path."""

    name = "oracle"
    exact = True
    waits_for_scores = True

    def scores_message(self) -> type[Message]:
        return Score

    def arrived(self, message: Message, seq: int) -> ScoreArrived:
        assert isinstance(message, Score)
        return ScoreArrived(
            ticket_id=message.ticket_id,
            seq=seq,
            terminal_seq=message.terminal_seq,
            terminal_digest=message.terminal_digest,
            sequences=message.sequences,
        )

    def at_step(
        self, members: Sequence[Scored], backend: Backend, version: int
    ) -> dict[str, tuple[SequenceScore, ...]]:
        return {member.ticket_id: member.scores for member in members}
