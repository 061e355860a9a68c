"""Stored scores of the oracle as staging's events."""

from __future__ import annotations

from services.learner.staging import ScoreArrived
from shared.wire.messages import Score


def score_event(score: Score, seq: int) -> ScoreArrived:
    """Return the event of a score stored at `seq`."""
    return ScoreArrived(
        ticket_id=score.ticket_id,
        seq=seq,
        terminal_seq=score.terminal_seq,
        terminal_digest=score.terminal_digest,
        sequences=score.sequences,
    )
