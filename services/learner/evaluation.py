"""One evaluation in progress: which held-out tickets ended how. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from shared.algo.pass_at_k import AtK, at_k
from shared.wire.journal import Evaluated
from shared.wire.messages import Ticket
from shared.wire.trajectory import Outcome, Trajectory


@dataclass
class EvaluationRound:
    """Collects the outcomes of one evaluation's tickets."""

    name: str
    """`base`, `progress` or `final`."""
    version: int
    tickets: dict[str, Ticket]
    """By ticket id; all of one evaluation."""
    outcomes: dict[str, Outcome] = field(default_factory=dict[str, Outcome])
    lowest_seq: int | None = None
    """Lowest sequence among its stored terminals."""

    def record(self, ticket_id: str, outcome: Outcome, seq: int) -> None:
        """Keep the first outcome of a ticket of this round; others are ignored."""
        if ticket_id in self.tickets:
            self.outcomes.setdefault(ticket_id, outcome)
            self.lowest_seq = seq if self.lowest_seq is None else min(self.lowest_seq, seq)

    @classmethod
    def of(cls, tickets: Sequence[Ticket]) -> EvaluationRound:
        """Rebuild a round from its tickets, whose group id names it."""
        _, name, version = tickets[0].group_id.split("-")
        return cls(name, int(version.removeprefix("v")), {t.ticket_id: t for t in tickets})

    @property
    def complete(self) -> bool:
        return len(self.outcomes) == len(self.tickets)

    def result(self) -> Evaluated:
        """Return the journal entry; failed episodes are left out, never counted as zero."""
        assert self.complete
        played = [
            (ticket.task.index, outcome.reward)
            for ticket_id, ticket in self.tickets.items()
            if isinstance(outcome := self.outcomes[ticket_id], Trajectory)
        ]
        return Evaluated(
            version=self.version,
            name=self.name,
            task_indices=tuple(index for index, _ in played),
            rewards=tuple(reward for _, reward in played),
            num_failed=len(self.tickets) - len(played),
        )

    def versions(self) -> tuple[int, int]:
        """Return the lowest and the highest version that sampled a token; both ours when pinned."""
        stamped = [
            span.version
            for outcome in self.outcomes.values()
            if isinstance(outcome, Trajectory)
            for sequence in outcome.sequences
            for span in sequence.spans
        ]
        return min(stamped, default=self.version), max(stamped, default=self.version)


def figures(result: Evaluated, samples: int, success: float) -> dict[str, float]:
    """Return avg@k and pass@k by name, with intervals; empty where nothing was played k times."""
    found: AtK | None = at_k(result.task_indices, result.rewards, samples, success)
    if found is None:
        return {}
    named = {"avg": found.avg, "pass": found.passes, "all_pass": found.all_pass}
    return {
        f"{name}{bound}": value
        for name, figure in named.items()
        for bound, value in (("", figure.mean), ("_low", figure.low), ("_high", figure.high))
    }
