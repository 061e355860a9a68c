"""Tickets whose time is over. Pure: the clock and the pauses are handed in."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from shared.wire.messages import Terminal, Ticket
from shared.wire.trajectory import Failure


@dataclass
class Pauses:
    """Seconds for which nobody could make progress: deadlines move by as much.

    The clock stands still while the bus is away; a ticket issued after an outage does not profit
    from it.
    """

    _pauses: list[tuple[float, float]]

    def __init__(self) -> None:
        self._pauses = []

    def add(self, ended_at: float, seconds: float) -> None:
        """Note a pause of `seconds` that ended at `ended_at` (Unix seconds)."""
        self._pauses.append((ended_at, seconds))

    def allowance_s(self, issued_at: float, deadline: float) -> float:
        """Return by how much a deadline moves: the pauses between issue and extended deadline."""
        extended = deadline
        for ended_at, seconds in self._pauses:
            started_at = ended_at - seconds
            if ended_at > issued_at and started_at < extended:
                extended += ended_at - max(started_at, issued_at)
        return extended - deadline


def overdue(
    tickets: Iterable[Ticket], now: float, pauses: Pauses, *, lifetime_s: float
) -> list[Ticket]:
    """Return the tickets whose deadline, moved by the pauses, is over.

    Args:
        tickets: without a terminal yet.
        now: Unix seconds.
        pauses: outages so far.
        lifetime_s: from issue to deadline.
    """
    return [
        ticket
        for ticket in tickets
        if now > ticket.deadline + pauses.allowance_s(ticket.deadline - lifetime_s, ticket.deadline)
    ]


def deadline_terminal(ticket: Ticket, pod: str, attempt_id: str) -> Terminal:
    """Return the failed terminal that the learner writes; whoever stores one first wins."""
    return Terminal(
        ticket_id=ticket.ticket_id,
        attempt_id=attempt_id,
        purpose=ticket.purpose,
        group_id=ticket.group_id,
        member=ticket.member,
        issue_version=ticket.issue_version,
        producer=pod,
        outcome=Failure(reason="deadline", detail="no terminal before the ticket's deadline"),
    )
