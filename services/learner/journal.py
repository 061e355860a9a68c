"""The journal folded into the learner's state: live and on replay by the same code.

Pure: `apply(body)` reads decisions and never recomputes them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, assert_never

from shared.wire.journal import (
    Batch,
    Disposed,
    Evaluated,
    Issued,
    JournalBody,
    RunFinished,
    RunStarted,
)
from shared.wire.messages import Ticket


def evaluation_group(name: str, version: int) -> str:
    """Group id of an evaluation's tickets."""
    return f"eval-{name}-v{version}"


@dataclass
class JournalState:
    """What the run has decided so far."""

    run: RunStarted | None = None
    """The first entry of the run: its seed and version 0."""
    num_starts: int = 0
    """Learner processes that took over, this one included once it has written its entry."""
    open_tickets: dict[str, Ticket] = field(default_factory=dict[str, Ticket])
    """Issued and neither trained, dropped, failed nor evaluated, in issue order."""
    issue_versions: dict[str, int] = field(default_factory=dict[str, int])
    """Open training group -> version it was issued at."""
    num_train_tickets: int = 0
    num_eval_tickets: int = 0
    num_train_groups: int = 0
    num_trained_groups: int = 0
    batches: dict[int, Batch] = field(default_factory=dict[int, Batch])
    """By the version they step from; trimmed by `forget_batches`."""
    cursor: dict[str, Any] = field(default_factory=dict[str, Any])
    evaluations: list[Evaluated] = field(default_factory=list[Evaluated])
    finished: RunFinished | None = None

    def apply(self, body: JournalBody) -> None:
        """Fold one entry."""
        match body:
            case RunStarted():
                self.run = self.run or body
                self.num_starts += 1
            case Issued():
                self._issue(body)
            case Batch():
                self.batches[body.version] = body
                self.num_trained_groups += len(body.groups)
                for group in body.groups:
                    del self.issue_versions[group.group_id]
                    self._close([m.ticket_id for m in group.members] + list(group.failed))
            case Disposed():
                self._dispose(body)
            case Evaluated():
                self.evaluations.append(body)
                group_id = evaluation_group(body.name, body.version)
                self._close([t.ticket_id for t in self._evaluation_tickets(group_id)])
            case RunFinished():
                self.finished = body
            case _:
                assert_never(body)

    def open_groups(self) -> dict[str, list[Ticket]]:
        """Open training tickets by group, in issue order."""
        groups: dict[str, list[Ticket]] = {}
        for ticket in self.open_tickets.values():
            if ticket.purpose == "train":
                groups.setdefault(ticket.group_id, []).append(ticket)
        return groups

    def open_evaluations(self) -> dict[str, list[Ticket]]:
        """Open evaluation tickets by evaluation, in issue order."""
        rounds: dict[str, list[Ticket]] = {}
        for ticket in self.open_tickets.values():
            if ticket.purpose == "eval":
                rounds.setdefault(ticket.group_id, []).append(ticket)
        return rounds

    def evaluation(self, name: str, version: int) -> Evaluated | None:
        """Return the result of an evaluation, once it is journalled."""
        found = (e for e in self.evaluations if (e.name, e.version) == (name, version))
        return next(found, None)

    def _evaluation_tickets(self, group_id: str) -> list[Ticket]:
        return self.open_evaluations().get(group_id, [])

    def forget_batches(self, below_version: int) -> None:
        """Drop batches no retained checkpoint needs any more; the newest one always stays."""
        for version in [v for v in self.batches if v < min(below_version, max(self.batches))]:
            del self.batches[version]

    def _issue(self, body: Issued) -> None:
        for ticket in body.tickets:
            self.open_tickets[ticket.ticket_id] = ticket
            if ticket.purpose == "eval":
                self.num_eval_tickets += 1
                continue
            self.num_train_tickets += 1
            if ticket.group_id not in self.issue_versions:
                self.issue_versions[ticket.group_id] = body.version
                self.num_train_groups += 1
        self.cursor = body.cursor or self.cursor

    def _dispose(self, body: Disposed) -> None:
        groups = {self.open_tickets[ticket_id].group_id for ticket_id in body.ticket_ids}
        self._close(body.ticket_ids)
        # A group may leave in two entries; between them it is still open.
        for group_id in groups - self.open_groups().keys():
            self.issue_versions.pop(group_id, None)

    def _close(self, ticket_ids: list[str] | tuple[str, ...]) -> None:
        for ticket_id in ticket_ids:
            del self.open_tickets[ticket_id]
