"""One attempt at a ticket, and the messages it leaves behind."""

from __future__ import annotations

from dataclasses import dataclass

from services.env_agents.episodes import Episode
from shared.runtime.context import Context
from shared.wire.fencing import PartialTrajectory
from shared.wire.messages import Terminal, Ticket
from shared.wire.trajectory import Outcome


@dataclass(frozen=True, slots=True)
class Attempt:
    """An episode in play; `attempt_id` is unique per delivery of the ticket."""

    ticket: Ticket
    attempt_id: str
    episode: Episode

    def partial(self, context: Context, generation: int, floor: int) -> PartialTrajectory | None:
        """Return its tokens so far, if any below `floor` are on no earlier partial.

        Evaluation is never trained, so that nobody has to score it.
        """
        sequences = self.episode.partial(floor) if self.ticket.purpose == "train" else None
        if sequences is None:
            return None
        return PartialTrajectory(
            ticket_id=self.ticket.ticket_id,
            attempt_id=self.attempt_id,
            generation=generation,
            producer=context.pod,
            incarnation=context.incarnation,
            sequences=sequences,
        )


def terminal_of(ticket: Ticket, attempt_id: str, producer: str, outcome: Outcome) -> Terminal:
    """Return how the ticket ended, with everything of the ticket that its readers join on."""
    return Terminal(
        ticket_id=ticket.ticket_id,
        attempt_id=attempt_id,
        purpose=ticket.purpose,
        group_id=ticket.group_id,
        member=ticket.member,
        issue_version=ticket.issue_version,
        producer=producer,
        outcome=outcome,
    )
