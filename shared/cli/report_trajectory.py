"""Which trained trajectory the report explains token by token: one with a version switch."""

from __future__ import annotations

from collections.abc import Iterator

from shared.cli.explain_old import STORED
from shared.cli.explain_records import Trained, explain_terminal
from shared.cli.explained import Explained
from shared.cli.ledger import Ledger
from shared.cli.records import RunRecords
from shared.wire.errors import WireError
from shared.wire.journal import Member
from shared.wire.trajectory import Sequence, Trajectory

_MAX_CANDIDATES = 400


def explain(records: RunRecords, ledger: Ledger) -> Explained | None:
    """Pick the most telling trained trajectory and explain it; None when nothing was trained."""
    best: tuple[tuple[float, ...], Trained] | None = None
    for trained in _candidates(records, ledger):
        rank = _rank(records, trained.member)
        if best is None or rank > best[0]:
            best = (rank, trained)
    if best is None:
        return None
    _, trained = best
    return explain_terminal(records, trained.member.terminal_seq, trained, fate="trained")


def _candidates(records: RunRecords, ledger: Ledger) -> Iterator[Trained]:
    """Yield members of the later half first that several versions sampled, then others."""
    stored = str(records.setting("old_logprobs.route", "oracle")) in STORED
    rows = [
        Trained(batch, group, member)
        for batch in ledger.lineage
        for group in batch.groups
        if not group.no_loss
        for member in group.members
        if member.terminal_seq in records.terminals
        and (member.score_seq in records.scores or not stored)
    ]
    middle = len(ledger.lineage) * 2 // 3
    rows.sort(
        key=lambda row: (
            len(records.terminals[row.member.terminal_seq].version_tokens) < 2,
            abs(row.batch.version - middle),
        )
    )
    yield from rows[:_MAX_CANDIDATES]


def _rank(records: RunRecords, member: Member) -> tuple[float, ...]:
    """Rank: two versions, a switch inside a turn, a reward, tokens on both sides, short."""
    try:
        outcome = records.terminal(member.terminal_seq).outcome
    except WireError:
        return (-1.0,)
    if not isinstance(outcome, Trajectory):
        return (-1.0,)
    sequence = outcome.sequences[0]
    counts = [count for _, count in records.terminals[member.terminal_seq].version_tokens]
    return (
        float(len(outcome.sequences) == 1),
        float(len(counts) > 1),
        float(_switches_inside_turn(sequence)),
        float(outcome.reward > 0),
        float(min(counts) >= 5),
        -abs(sum(counts) - 24.0),
    )


def _switches_inside_turn(sequence: Sequence) -> bool:
    return any(
        turn.start < span.start < turn.stop for turn in sequence.turns for span in sequence.spans
    )
