"""Whether each trained trajectory is what the journal says it is, and how old its tokens were."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import cast

from shared.cli.records import ScoreFacts, TerminalFacts
from shared.runtime.sections import EXACT_ROUTES
from shared.wire.journal import Batch, JournalBody, Member, RunStarted, TrainedGroup
from shared.wire.messages import Ticket

STORED_AFTERWARDS = "snapshot_old"
"""The exact route whose batches are journalled before their scores are stored."""


_STRICTEST = "oracle"


def routes_of(bodies: Iterable[JournalBody]) -> dict[tuple[int, int], str]:
    """Return by (version, epoch) the route of a batch: that of the process that journalled it.

    A start whose entry does not say is held to the strictest, the oracle's.
    """
    route, found = _STRICTEST, dict[tuple[int, int], str]()
    for body in bodies:
        if isinstance(body, RunStarted):
            section = body.config.get("old_logprobs") or {}
            route = str(cast("Mapping[str, object]", section).get("route", _STRICTEST))
        elif isinstance(body, Batch):
            found.setdefault((body.version, body.epoch), route)
    return found


class Problems:
    """What does not add up: one line per kind, with a count and the first case."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._first: dict[str, str] = {}

    def note(self, problem: str, case: str) -> None:
        """Count one case of a problem."""
        self._counts[problem] += 1
        self._first.setdefault(problem, case)

    def lines(self) -> tuple[str, ...]:
        return tuple(f"{p}: {n} (first: {self._first[p]})" for p, n in self._counts.items())


class TrainedMembers:
    """Follows the members of the final lineage to their records and counts their tokens."""

    def __init__(
        self,
        issued: Mapping[str, Ticket],
        terminals: Mapping[int, TerminalFacts],
        scores: Mapping[int, ScoreFacts],
        digests: Mapping[int, str],
        max_staleness: int,
        problems: Problems,
    ) -> None:
        self._issued = issued
        self._terminals = terminals
        self._scores = scores
        self._score_of = {score.ticket_id: score for score in scores.values()}
        self._digests = digests
        self._max_staleness = max_staleness
        self._problems = problems
        self.age_tokens: Counter[int] = Counter()
        self.tokens_trained = self.tokens_exact = self.tokens_admitted = 0

    def read(self, batch: Batch, group: TrainedGroup, member: Member, route: str) -> None:
        """Check one member of a batch trained on `route` and count its tokens."""
        self._check_issue(member, group)
        terminal = self._terminals.get(member.terminal_seq)
        if terminal is None:
            self._problems.note("trained on a terminal that is not in the log", member.ticket_id)
            return
        if (terminal.ticket_id, terminal.digest) != (member.ticket_id, member.terminal_digest):
            self._problems.note(
                "trained on a terminal of another ticket or content", member.ticket_id
            )
        if terminal.failed:
            self._problems.note("trained on a failed episode", member.ticket_id)
        elif terminal.reward != member.reward:
            self._problems.note("trained with another reward than its terminal's", member.ticket_id)
        self._count_tokens(batch, group, terminal, self._checked_score(member, route))

    def _check_issue(self, member: Member, group: TrainedGroup) -> None:
        ticket = self._issued.get(member.ticket_id)
        if ticket is None:
            self._problems.note("trained but never issued", member.ticket_id)
        elif ticket.purpose != "train":
            self._problems.note("an evaluation ticket was trained", member.ticket_id)
        elif ticket.group_id != group.group_id:
            self._problems.note("trained in another group than it was issued in", member.ticket_id)

    def _checked_score(self, member: Member, route: str) -> ScoreFacts | None:
        """Return the score that a member was trained with, None where its route stores none.

        Under `snapshot_old` the learner stores what it computed after the batch was journalled:
        it is found by ticket, of which there is one. An approximate route has no score, and an
        oracle's beside it is a shadow's.
        """
        if not member.score_seq and route not in EXACT_ROUTES:
            return None
        score = self._scores.get(member.score_seq)
        if not member.score_seq and route == STORED_AFTERWARDS:
            score = self._score_of.get(member.ticket_id)
        wanted = (member.ticket_id, member.terminal_seq, member.terminal_digest)
        if score is None:
            self._problems.note("trained with a score that is not in the log", member.ticket_id)
        elif (score.ticket_id, score.terminal_seq, score.terminal_digest) != wanted:
            self._problems.note("trained with the score of another terminal", member.ticket_id)
        return score

    def _count_tokens(
        self, batch: Batch, group: TrainedGroup, terminal: TerminalFacts, score: ScoreFacts | None
    ) -> None:
        exact = {
            version
            for version, digest in (score.exact_versions if score else ())
            if self._digests.get(version) == digest
        }
        ticket = self._issued.get(terminal.ticket_id)
        num_exact = 0
        for version, count in terminal.version_tokens:
            age = batch.version - version
            num_exact += count if version in exact else 0
            if ticket is not None and version < ticket.min_version:
                self._problems.note("sampled below the ticket's min_version", terminal.ticket_id)
            if version in group.masked_versions:
                continue
            if not 0 <= age <= self._max_staleness:
                self._problems.note(
                    f"token age outside 0..{self._max_staleness}",
                    f"{terminal.ticket_id}, v{version} trained from v{batch.version}",
                )
            self.age_tokens[age] += count
            self.tokens_trained += 0 if group.no_loss else count
        self.tokens_admitted += terminal.num_tokens
        self.tokens_exact += max(0, num_exact - terminal.num_mixed_kv)
