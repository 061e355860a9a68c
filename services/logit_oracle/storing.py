"""Putting a score on the log, once per terminal."""

from __future__ import annotations

from shared.runtime.bus import Bus, Record
from shared.runtime.errors import Conflict
from shared.wire.codec import decode, encode
from shared.wire.errors import WireError
from shared.wire.messages import Score

ATTEMPTS = 3


async def store_score(bus: Bus, score: Score) -> bool:
    """Append a score; return False when the terminal already has one.

    The fence on the ticket does not outlive a purge of the terminals: a score of an earlier
    terminal under the same ticket id is superseded, for the learner joins on sequence and digest.

    Raises:
        Conflict: the subject keeps changing.
        StreamFull, BusUnavailable, PayloadTooLarge, Denied: see `Bus.append`.
    """
    subject = bus.subjects.score(score.ticket_id)
    payload = encode(score)
    expected = 0
    for _ in range(ATTEMPTS):
        try:
            await bus.append(subject, payload, expect_last_subject_seq=expected)
            return True
        except Conflict:
            record = await bus.last(subject)
            if record is not None and _terminal_of(record) >= score.terminal_seq:
                return False
            expected = 0 if record is None else record.seq
    raise Conflict(subject, expected)


def _terminal_of(record: Record) -> int:
    """Return the sequence of the terminal that a stored score belongs to, 0 when unreadable."""
    try:
        return decode(record.payload, Score).terminal_seq
    except WireError:
        return 0
