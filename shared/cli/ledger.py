"""The ledger of a run: where every issued ticket went, counted from journal and log.

Pure, and independent of the learner: a second reading of the same records by other code. For
training tickets `issued = trained + dropped + failed + unfinished + lost`; `duplicated` counts
tickets trained more than once in the final lineage. Evaluation tickets have a count of their own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from shared.cli.ledger_members import Problems, TrainedMembers, routes_of
from shared.cli.records import RunRecords, ScoreFacts, TerminalFacts
from shared.wire.journal import (
    Batch,
    Disposed,
    Evaluated,
    Issued,
    JournalBody,
    RunFinished,
    RunStarted,
    TrainedGroup,
)
from shared.wire.messages import Ticket


@dataclass(frozen=True)
class Counts:
    """Training tickets by how they ended."""

    issued: int = 0
    trained: int = 0
    dropped: int = 0
    failed: int = 0
    unfinished: int = 0
    lost: int = 0
    duplicated: int = 0
    """Of the trained ones; no part of the sum."""


@dataclass(frozen=True)
class EvaluationCounts:
    """Evaluation tickets by how they ended."""

    issued: int = 0
    evaluated: int = 0
    failed: int = 0
    open: int = 0


@dataclass(frozen=True)
class Ledger:
    """What became of every ticket, and everything that does not add up."""

    training: Counts
    evaluation: EvaluationCounts
    lost: tuple[str, ...]
    duplicated: tuple[str, ...]
    problems: tuple[str, ...]
    """One line each."""
    lineage: tuple[Batch, ...]
    """Batches of the final lineage, by version."""
    age_tokens: dict[int, int] = field(default_factory=dict[int, int])
    """Sampled tokens of trained trajectories by age in versions, masked ones left out."""
    tokens_trained: int = 0
    """Tokens in the loss: without masked versions and groups that contribute no loss."""
    tokens_exact: int = 0
    """Sampled tokens of trained trajectories scored under their own, verified version."""
    tokens_admitted: int = 0
    """Sampled tokens of trained trajectories, masked and unscorable ones included."""
    drop_causes: dict[str, int] = field(default_factory=dict[str, int])
    """Dropped and failed training tickets by cause."""
    routes: dict[int, str] = field(default_factory=dict[int, str])
    """By version stepped from: where the old log-probs of the lineage's batch came from."""

    @property
    def ok(self) -> bool:
        return not self.problems

    @property
    def staleness_max(self) -> int:
        return max(self.age_tokens, default=0)

    @property
    def staleness_mean(self) -> float:
        tokens = sum(self.age_tokens.values())
        return sum(age * n for age, n in self.age_tokens.items()) / tokens if tokens else 0.0

    @property
    def exact_ratio(self) -> float:
        """`old_logits_exact_ratio` (design.md 3)."""
        return self.tokens_exact / self.tokens_admitted if self.tokens_admitted else 0.0


def of_run(records: RunRecords) -> Ledger:
    """Return the ledger of a run's records."""
    ledger = balance(
        records.bodies,
        records.terminals,
        records.scores,
        queued=records.queued,
        digests={v: m.digest for v, m in records.manifests.items()},
        max_staleness=int(records.setting("admission.max_staleness", 4)),
    )
    return ledger


def final_lineage(bodies: Iterable[JournalBody]) -> tuple[list[Batch], list[Batch]]:
    """Return (the batches that made the final policy, batches that repeat one of them).

    Of several batches that step from one version the highest epoch counts; a second one of the
    same version and epoch is a repetition.
    """
    kept: dict[int, Batch] = {}
    repeated: list[Batch] = []
    for body in bodies:
        if not isinstance(body, Batch):
            continue
        known = kept.get(body.version)
        if known is None or body.epoch > known.epoch:
            kept[body.version] = body
        elif body.epoch == known.epoch:
            repeated.append(body)
    return [kept[version] for version in sorted(kept)], repeated


def balance(
    bodies: Sequence[JournalBody],
    terminals: Mapping[int, TerminalFacts],
    scores: Mapping[int, ScoreFacts],
    *,
    queued: Collection[str],
    digests: Mapping[int, str],
    max_staleness: int,
) -> Ledger:
    """Balance the books.

    Args:
        bodies: the journal, in order.
        terminals: every stored terminal by sequence.
        scores: every stored score by sequence.
        queued: ids of the tickets still in the ticket stream at the end.
        digests: by version, the digest in its manifest.
        max_staleness: the configured bound, in versions.
    """
    return _Books(bodies, terminals, scores, queued, digests, max_staleness).close()


class _Books:
    """The work of `balance`, one question per method."""

    def __init__(
        self,
        bodies: Sequence[JournalBody],
        terminals: Mapping[int, TerminalFacts],
        scores: Mapping[int, ScoreFacts],
        queued: Collection[str],
        digests: Mapping[int, str],
        max_staleness: int,
    ) -> None:
        self._bodies = bodies
        self._terminals = terminals
        self._queued = set(queued)
        self._problems = Problems()
        self._issued: dict[str, Ticket] = {}
        self._members = TrainedMembers(
            self._issued, terminals, scores, digests, max_staleness, self._problems
        )
        self._stored = {facts.ticket_id for facts in terminals.values()}
        self._times_trained: Counter[str] = Counter()
        self._failed: dict[str, str] = {}
        self._dropped: dict[str, str] = {}
        self._closed_groups: set[str] = set()

    def close(self) -> Ledger:
        self._read_issues()
        lineage, repeated = final_lineage(self._bodies)
        route_of = routes_of(self._bodies)
        routes = {batch.version: route_of[batch.version, batch.epoch] for batch in lineage}
        for batch in lineage:
            for group in batch.groups:
                self._read_group(batch, group, routes[batch.version])
        for batch in repeated:
            self._problems.note(
                "two batches of one epoch step from one version", f"v{batch.version}"
            )
            for member in (m for group in batch.groups for m in group.members):
                self._times_trained[member.ticket_id] += 2
        self._read_disposals()
        self._check_terminals()
        training, lost, duplicated = self._classify()
        evaluation = self._evaluation()
        return Ledger(
            training=training,
            evaluation=evaluation,
            lost=lost,
            duplicated=duplicated,
            problems=self._problems.lines(),
            lineage=tuple(lineage),
            age_tokens=dict(sorted(self._members.age_tokens.items())),
            tokens_trained=self._members.tokens_trained,
            tokens_exact=self._members.tokens_exact,
            tokens_admitted=self._members.tokens_admitted,
            drop_causes=dict(
                Counter(c for book in (self._dropped, self._failed) for c in book.values())
            ),
            routes=routes,
        )

    def _read_issues(self) -> None:
        for body in self._bodies:
            for ticket in body.tickets if isinstance(body, Issued) else ():
                if ticket.ticket_id in self._issued:
                    self._problems.note("ticket issued twice", ticket.ticket_id)
                self._issued[ticket.ticket_id] = ticket

    def _read_group(self, batch: Batch, group: TrainedGroup, route: str) -> None:
        self._closed_groups.add(group.group_id)
        for ticket_id in group.failed:
            self._failed[ticket_id] = "failed in a trained group"
        for member in group.members:
            self._times_trained[member.ticket_id] += 1
            self._members.read(batch, group, member, route)

    def _read_disposals(self) -> None:
        for body in self._bodies:
            if not isinstance(body, Disposed):
                continue
            for ticket_id in body.ticket_ids:
                if ticket_id not in self._issued:
                    self._problems.note("disposed of but never issued", ticket_id)
                ticket = self._issued.get(ticket_id)
                if ticket is not None and ticket.purpose == "train":
                    book = self._failed if body.outcome == "failed" else self._dropped
                    book[ticket_id] = body.cause

    def _check_terminals(self) -> None:
        seen: dict[str, TerminalFacts] = {}
        for facts in self._terminals.values():
            ticket = self._issued.get(facts.ticket_id)
            if facts.ticket_id in seen:
                self._problems.note("more than one terminal for a ticket", facts.ticket_id)
            if ticket is None:
                self._problems.note("a terminal for a ticket never issued", facts.ticket_id)
            elif ticket.purpose != facts.purpose:
                self._problems.note(
                    "a terminal with another purpose than its ticket", facts.ticket_id
                )
            seen[facts.ticket_id] = facts

    def _classify(self) -> tuple[Counts, tuple[str, ...], tuple[str, ...]]:
        counts: Counter[str] = Counter()
        lost: list[str] = []
        declared, finished = self._declared_unfinished()
        for ticket_id, ticket in self._issued.items():
            if ticket.purpose != "train":
                continue
            ends = [
                name
                for name, book in (
                    ("trained", self._times_trained), ("dropped", self._dropped),
                    ("failed", self._failed),
                )
                if ticket_id in book
            ]  # fmt: skip
            if len(ends) > 1:
                self._problems.note("a ticket ended in more than one way", f"{ticket_id}: {ends}")
            if not ends:
                # A group is trained whole: a member that its group left behind is not unfinished.
                left_behind = ticket.group_id in self._closed_groups
                open_at_end = ticket_id in declared or not finished
                evidence = ticket_id in self._stored or ticket_id in self._queued
                ends = ["unfinished" if open_at_end and evidence and not left_behind else "lost"]
            counts[ends[0]] += 1
            if ends[0] == "lost":
                lost.append(ticket_id)
                self._problems.note("a ticket is lost", ticket_id)
        duplicated = tuple(t for t, times in self._times_trained.items() if times > 1)
        for ticket_id in duplicated:
            self._problems.note("a ticket was trained more than once", ticket_id)
        training = Counts(issued=counts.total(), **dict(counts), duplicated=len(duplicated))
        return training, tuple(lost), duplicated

    def _declared_unfinished(self) -> tuple[frozenset[str], bool]:
        """Return what the learner declared unfinished, and whether the run is finished."""
        last: RunFinished | None = None
        for body in self._bodies:
            if isinstance(body, RunFinished):
                last = body
            elif isinstance(body, RunStarted):
                last = None
        return frozenset(last.unfinished if last else ()), last is not None

    def _evaluation(self) -> EvaluationCounts:
        issued = [t for t in self._issued.values() if t.purpose == "eval"]
        reward_of = {f.ticket_id: f.reward for f in self._terminals.values() if not f.failed}
        played: set[tuple[int, int, float]] = {
            (ticket.issue_version, ticket.task.index, reward_of[ticket.ticket_id])
            for ticket in issued
            if ticket.ticket_id in reward_of
        }
        evaluated = failed = 0
        for body in self._bodies:
            if not isinstance(body, Evaluated):
                continue
            evaluated += len(body.rewards)
            failed += body.num_failed
            for index, reward in zip(body.task_indices, body.rewards, strict=True):
                if (body.version, index, reward) not in played:
                    self._problems.note(
                        "a journalled evaluation reward is no terminal's",
                        f"{body.name} at v{body.version}, task {index}",
                    )
        return EvaluationCounts(len(issued), evaluated, failed, len(issued) - evaluated - failed)
