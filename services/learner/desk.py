"""The learner's desk: what is issued, what came back, what may be trained next.

Joins the pure parts (journal, admission, staging, evaluation rounds) and keeps them consistent;
everything that touches the bus goes through the journal first.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace

from services.learner.admission import Admission
from services.learner.config import LearnerConfig
from services.learner.evaluation import EvaluationRound
from services.learner.journal_log import JournalLog
from services.learner.staging import (
    CompleteGroup,
    Event,
    GroupCompleted,
    GroupFailed,
    GroupIssued,
    GroupRemoved,
    Refused,
    ScoreArrived,
    Scored,
    ScoreLost,
    Staging,
    TerminalArrived,
)
from services.learner.task_source import TaskSource, WatchesOutcomes
from services.learner.ticketing import evaluation_tickets, training_groups
from shared.runtime.context import Context
from shared.runtime.errors import Conflict
from shared.wire.codec import encode
from shared.wire.journal import Batch, Disposed, Issued
from shared.wire.messages import Ticket
from shared.wire.trajectory import Failure, Trajectory

Objection = Callable[[Trajectory], str]


class Desk:
    """State and decisions of one learner process."""

    def __init__(
        self,
        context: Context,
        config: LearnerConfig,
        journal: JournalLog,
        source: TaskSource,
        *,
        needs_scores: bool,
        objection: Objection | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Begin with nothing issued; `objection` says why the model cannot train a trajectory."""
        admission = config.admission
        self.admission = Admission(
            admission.groups_per_version, admission.max_staleness, admission.max_outstanding_groups
        )
        self.staging = Staging(needs_scores=needs_scores)
        self.ready: dict[str, CompleteGroup] = {}
        self.rounds: dict[str, EvaluationRound] = {}
        self.changed = asyncio.Event()
        """Set whenever something arrived, left or was published."""
        self.dispatched_lengths: list[int] = []
        """Sampled tokens of the trajectories that arrived since the last step report."""
        self._context = context
        self._config = config
        self._journal = journal
        self._source = source
        self._objection = objection
        self._clock = clock
        self._numbering = asyncio.Lock()
        self._failed: list[GroupFailed] = []

    # --- arrivals
    def terminal(self, event: TerminalArrived) -> None:
        """Take in how a ticket ended; tickets that the journal has disposed of are refused."""
        ticket = self._journal.state.open_tickets.get(event.ticket_id)
        if ticket is not None and ticket.purpose == "eval":
            if ticket.group_id in self.rounds:
                self.rounds[ticket.group_id].record(event.ticket_id, event.outcome, event.seq)
                self.changed.set()
            return
        if ticket is not None:
            event = self._usable(event)
        if ticket is not None and event.outcome.kind == "trajectory":
            sequences = event.outcome.sequences
            self.dispatched_lengths.append(sum(int(s.loss_mask.numpy().sum()) for s in sequences))
            if isinstance(self._source, WatchesOutcomes):
                self._source.outcome(ticket.task, event.outcome.reward)
        self._apply(event)
        if ticket is not None and self.staging.is_played(ticket.group_id):
            self.changed.set()

    def _usable(self, event: TerminalArrived) -> TerminalArrived:
        """End a ticket as failed whose trajectory would end every step that it is part of."""
        if self._objection is None or not isinstance(event.outcome, Trajectory):
            return event
        problem = self._objection(event.outcome)
        if not problem:
            return event
        self._context.count("failed_undecodable")
        self._context.log.error("terminal_refused", ticket=event.ticket_id, reason=problem)
        return replace(event, outcome=Failure(reason="undecodable", detail=problem))

    def score(self, event: ScoreArrived) -> None:
        """Take in old log-probs."""
        self._apply(event)

    def score_lost(self, ticket_id: str, cause: str) -> None:
        """Give up on a score: the ticket counts as failed, so that no group waits for ever."""
        self._context.count("scores_lost")
        self._context.log.warning("score_lost", ticket_id=ticket_id, cause=cause)
        self._apply(ScoreLost(ticket_id))

    def floors(self, next_terminal: int, next_score: int) -> dict[str, int]:
        """Return by stream the lowest sequence that an open group or evaluation still needs."""
        floors = self.staging.floors(next_terminal, next_score)
        rounds = [r.lowest_seq for r in self.rounds.values() if r.lowest_seq is not None]
        return floors | {"terminals": min([floors["terminals"], *rounds])}

    def adopt(self, group_id: str, tickets: list[Ticket], issue_version: int) -> None:
        """Take over a group of an earlier learner process."""
        self.admission.outstanding[group_id] = issue_version
        ids = tuple(t.ticket_id for t in tickets)
        self._apply(GroupIssued(group_id, issue_version, ids))

    def _apply(self, event: Event) -> None:
        for action in self.staging.handle(event):
            match action:
                case GroupCompleted(group):
                    self.ready[group.group_id] = group
                    self.changed.set()
                case GroupFailed():
                    self._failed.append(action)
                    self.changed.set()
                case Refused(ticket_id, cause):
                    self._context.count(f"refused_{cause}")
                    self._context.log.debug("refused", ticket_id=ticket_id, cause=cause)

    # --- issuing
    async def issue(self) -> int:
        """Issue as many groups as admission allows and the run still needs; return how many."""
        async with self._numbering:
            num_groups = min(self.admission.num_to_issue(), self._still_needed())
            if num_groups <= 0:
                return 0
            version = self.admission.version
            tickets = training_groups(
                num_groups,
                self._journal.state,
                self._source,
                self._config,
                version=version,
                now=self._clock(),
            )
            await self._journal.write(
                Issued(version=version, tickets=tickets, cursor=self._source.cursor())
            )
            groups: dict[str, list[str]] = {}
            for ticket in tickets:
                groups.setdefault(ticket.group_id, []).append(ticket.ticket_id)
            for group_id, ids in groups.items():
                self.admission.outstanding[group_id] = version
                self._apply(GroupIssued(group_id, version, tuple(ids)))
        await self.publish_tickets(tickets)
        return num_groups

    async def issue_evaluation(self, name: str, version: int, num_episodes: int) -> EvaluationRound:
        """Issue a round of held-out tasks, outside admission."""
        section = self._config.learner.eval
        async with self._numbering:
            tickets = evaluation_tickets(
                name,
                self._source.evaluation(num_episodes // section.samples),
                self._journal.state,
                self._config,
                version=version,
                deadline=self._clock() + section.deadline_s,
                samples=section.samples,
            )
            round_ = EvaluationRound.of(tickets)
            self.rounds[tickets[0].group_id] = round_
            await self._journal.write(Issued(version=version, tickets=tickets))
        await self.publish_tickets(tickets)
        return round_

    async def publish_tickets(self, tickets: tuple[Ticket, ...] | list[Ticket]) -> None:
        """Store tickets on the work queue; one that is still there stays as it is."""
        window = asyncio.Semaphore(32)

        async def publish(ticket: Ticket) -> None:
            async with window:
                subject = self._context.bus.subjects.ticket(ticket.ticket_id)
                try:
                    await self._context.bus.append(
                        subject, encode(ticket), expect_last_subject_seq=0
                    )
                except Conflict:
                    self._context.count("tickets_already_queued")

        async with asyncio.TaskGroup() as group:
            for ticket in tickets:
                group.create_task(publish(ticket))

    def _still_needed(self) -> int:
        admission = self.admission
        to_train = admission.groups_per_version * (
            self._config.learner.versions - admission.version
        )
        return to_train - admission.trained_since_publication - len(admission.outstanding)

    # --- taking away
    async def dispose_failed(self) -> None:
        """Journal groups of which every member failed, and make room for others."""
        while self._failed:
            group = self._failed.pop()
            await self._journal.write(
                Disposed(ticket_ids=group.failed, outcome="failed", cause="every member failed")
            )
            self._release(group.group_id, trained=False)

    async def drop_stale(self) -> None:
        """With `on_stale: drop`, journal and drop complete groups that are over age."""
        for group_id in self.admission.over_age(self.ready):
            group = self.ready.pop(group_id)
            ids = tuple(m.ticket_id for m in group.members)
            if ids:
                await self._journal.write(
                    Disposed(ticket_ids=ids, outcome="dropped", cause="stale")
                )
            if group.failed:
                await self._journal.write(
                    Disposed(ticket_ids=group.failed, outcome="failed", cause="member failed")
                )
            self._release(group_id, trained=False)

    def batch_is_played(self) -> bool:
        """Return whether a step could start if everything played were scored."""
        hold = self._config.admission.on_stale == "hold"
        return bool(self.admission.choose(self.staging.played_groups, hold=hold))

    def next_groups(self) -> list[CompleteGroup]:
        """Return the groups of the next batch, oldest first, or none when a step may not start."""
        hold = self._config.admission.on_stale == "hold"
        return [self.ready[g] for g in self.admission.choose(self.ready, hold=hold)]

    def take(self, batch: Batch) -> dict[str, Scored]:
        """Remove a journalled batch's groups; return its members by ticket id."""
        members: dict[str, Scored] = {}
        for group in batch.groups:
            complete = self.ready.pop(group.group_id)
            members |= {m.ticket_id: m for m in complete.members}
            self._release(group.group_id, trained=True)
        return members

    def _release(self, group_id: str, *, trained: bool) -> None:
        self.admission.release([group_id], trained=trained)
        self._apply(GroupRemoved(group_id))
        self.changed.set()
