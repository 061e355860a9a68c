"""Staging: terminals and scores come in, in any order; complete groups come out.

A pure state machine: `handle(event) -> list[Action]`, no clock, no IO. A ticket is *settled* when
its failure is known, or its trajectory and the score that belongs to exactly that terminal
(sequence and digest). A group is complete when all its tickets are settled.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from shared.wire.messages import SequenceScore
from shared.wire.trajectory import Failure, Outcome, Trajectory


@dataclass(frozen=True, slots=True)
class GroupIssued:
    """These tickets form one group."""

    group_id: str
    issue_version: int
    ticket_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TerminalArrived:
    """How one ticket ended."""

    ticket_id: str
    seq: int
    digest: str
    outcome: Outcome
    attempt_id: str = ""


@dataclass(frozen=True, slots=True)
class ScoreArrived:
    """Old log-probs for one terminal."""

    ticket_id: str
    seq: int
    terminal_seq: int
    terminal_digest: str
    sequences: tuple[SequenceScore, ...]


@dataclass(frozen=True, slots=True)
class ScoreLost:
    """No usable score will come for this ticket: it counts as failed, never as scored."""

    ticket_id: str


@dataclass(frozen=True, slots=True)
class GroupRemoved:
    """The group was trained or dropped."""

    group_id: str


Event = GroupIssued | TerminalArrived | ScoreArrived | ScoreLost | GroupRemoved


@dataclass(frozen=True, slots=True)
class Scored:
    """A settled trajectory with its exact old log-probs and the places of both records."""

    ticket_id: str
    terminal_seq: int
    terminal_digest: str
    score_seq: int
    trajectory: Trajectory
    scores: tuple[SequenceScore, ...]


@dataclass(frozen=True, slots=True)
class CompleteGroup:
    """All members settled; at least one trajectory among them."""

    group_id: str
    issue_version: int
    members: tuple[Scored, ...]
    """In ticket order."""
    failed: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class GroupCompleted:
    """Action: the group can be trained."""

    group: CompleteGroup


@dataclass(frozen=True, slots=True)
class GroupFailed:
    """Action: every member failed; nothing to train."""

    group_id: str
    failed: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Refused:
    """Action: an event that must not be used, with the cause, to be counted."""

    ticket_id: str
    cause: str


Action = GroupCompleted | GroupFailed | Refused


@dataclass
class _Group:
    issue_version: int
    ticket_ids: tuple[str, ...]
    num_settled: int = 0


@dataclass
class Staging:
    """Joins terminals and scores by ticket, tickets by group."""

    needs_scores: bool = True
    """False for routes that compute old log-probs at the step."""
    _groups: dict[str, _Group] = field(default_factory=dict[str, _Group])
    _group_of: dict[str, str] = field(default_factory=dict[str, str])
    _terminals: dict[str, TerminalArrived] = field(default_factory=dict[str, TerminalArrived])
    _scores: dict[str, ScoreArrived] = field(default_factory=dict[str, ScoreArrived])
    _early_scores: dict[str, ScoreArrived] = field(default_factory=dict[str, ScoreArrived])
    """Scores read before their terminal was."""
    _lost: set[str] = field(default_factory=set[str])
    """Tickets whose score is lost."""

    def handle(self, event: Event) -> list[Action]:
        """Apply one event."""
        match event:
            case GroupIssued():
                return self._on_issued(event)
            case TerminalArrived():
                return self._on_terminal(event)
            case ScoreArrived():
                return self._on_score(event)
            case ScoreLost(ticket_id):
                return self._on_lost(ticket_id)
            case GroupRemoved(group_id):
                self._forget(group_id)
                return []

    @property
    def unsettled_tickets(self) -> tuple[str, ...]:
        """Tickets without a terminal yet."""
        return tuple(t for t in self._group_of if t not in self._terminals)

    @property
    def unscored_tickets(self) -> tuple[str, ...]:
        """Tickets whose trajectory waits for its score; none where no score is needed."""
        if not self.needs_scores:
            return ()
        return tuple(
            ticket
            for ticket, terminal in self._terminals.items()
            if isinstance(terminal.outcome, Trajectory)
            and ticket not in self._scores
            and ticket not in self._lost
        )

    @property
    def unscored(self) -> tuple[TerminalArrived, ...]:
        """Trajectories that wait for their score."""
        return tuple(self._terminals[ticket_id] for ticket_id in self.unscored_tickets)

    @property
    def played_groups(self) -> tuple[str, ...]:
        """Groups that are complete, or will be with the scores of what was played."""
        return tuple(group_id for group_id in self._groups if self.is_played(group_id))

    def is_played(self, group_id: str) -> bool:
        """Whether every ticket of a group has ended, and not all of them failed."""
        group = self._groups.get(group_id)
        return (
            group is not None
            and all(t in self._terminals for t in group.ticket_ids)
            and any(self._played(t) for t in group.ticket_ids)
        )

    def floors(self, next_terminal: int, next_score: int) -> dict[str, int]:
        """Return by stream the lowest sequence that an untrained group may still need."""
        scores = [*self._scores.values(), *self._early_scores.values()]
        return {
            "terminals": min((t.seq for t in self._terminals.values()), default=next_terminal),
            "scores": min((s.seq for s in scores), default=next_score),
        }

    def _on_issued(self, event: GroupIssued) -> list[Action]:
        assert event.group_id not in self._groups
        self._groups[event.group_id] = _Group(event.issue_version, event.ticket_ids)
        for ticket_id in event.ticket_ids:
            self._group_of[ticket_id] = event.group_id
        return []

    def _on_terminal(self, event: TerminalArrived) -> list[Action]:
        if event.ticket_id not in self._group_of:
            return [Refused(event.ticket_id, "terminal_of_unknown_ticket")]
        if event.ticket_id in self._terminals:
            return [Refused(event.ticket_id, "second_terminal")]
        self._terminals[event.ticket_id] = event
        early = self._early_scores.pop(event.ticket_id, None)
        lost = event.ticket_id in self._lost
        if isinstance(event.outcome, Failure) or lost or not self.needs_scores:
            return self._settle(event.ticket_id)
        return [] if early is None else self._on_score(early)

    def _on_score(self, event: ScoreArrived) -> list[Action]:
        if event.ticket_id not in self._group_of:
            return [Refused(event.ticket_id, "score_of_unknown_ticket")]
        if event.ticket_id in self._scores or event.ticket_id in self._lost:
            return [Refused(event.ticket_id, "second_score")]
        terminal = self._terminals.get(event.ticket_id)
        if terminal is None:
            self._early_scores[event.ticket_id] = event
            return []
        # A ticket id is not content identity: only the score of this very terminal may be joined.
        if (terminal.seq, terminal.digest) != (event.terminal_seq, event.terminal_digest):
            return [Refused(event.ticket_id, "score_of_another_terminal")]
        if not isinstance(terminal.outcome, Trajectory) or not _fits(terminal.outcome, event):
            lost = self._on_lost(event.ticket_id)
            return [Refused(event.ticket_id, "score_does_not_fit"), *lost]
        self._scores[event.ticket_id] = event
        return self._settle(event.ticket_id)

    def _on_lost(self, ticket_id: str) -> list[Action]:
        known = ticket_id in self._group_of
        if not known or ticket_id in self._scores or ticket_id in self._lost:
            return []
        self._lost.add(ticket_id)
        terminal = self._terminals.get(ticket_id)
        if terminal is None or isinstance(terminal.outcome, Failure):
            return []
        return self._settle(ticket_id)

    def _settle(self, ticket_id: str) -> list[Action]:
        group_id = self._group_of[ticket_id]
        group = self._groups[group_id]
        group.num_settled += 1
        if group.num_settled < len(group.ticket_ids):
            return []
        members = tuple(self._scored(t) for t in group.ticket_ids if self._played(t))
        failed = tuple(t for t in group.ticket_ids if not self._played(t))
        if not members:
            return [GroupFailed(group_id, failed)]
        return [GroupCompleted(CompleteGroup(group_id, group.issue_version, members, failed))]

    def _played(self, ticket_id: str) -> bool:
        played = isinstance(self._terminals[ticket_id].outcome, Trajectory)
        return played and ticket_id not in self._lost

    def _scored(self, ticket_id: str) -> Scored:
        terminal = self._terminals[ticket_id]
        score = self._scores.get(ticket_id)
        assert isinstance(terminal.outcome, Trajectory)
        return Scored(
            ticket_id=ticket_id,
            terminal_seq=terminal.seq,
            terminal_digest=terminal.digest,
            score_seq=score.seq if score else 0,
            trajectory=terminal.outcome,
            scores=score.sequences if score else (),
        )

    def _forget(self, group_id: str) -> None:
        for ticket_id in self._groups.pop(group_id).ticket_ids:
            del self._group_of[ticket_id]
            self._terminals.pop(ticket_id, None)
            self._scores.pop(ticket_id, None)
            self._early_scores.pop(ticket_id, None)
            self._lost.discard(ticket_id)


def _fits(trajectory: Trajectory, score: ScoreArrived) -> bool:
    lengths = [s.token_ids.shape for s in trajectory.sequences]
    return lengths == [s.old_logprobs.shape for s in score.sequences]
