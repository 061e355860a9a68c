"""One trained trajectory, token by token, with its version switch and all three log-probs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from shared.cli.audit_rescoring import Rescoring
from shared.cli.ledger import Ledger
from shared.cli.records import RunRecords
from shared.cli.reference_forward import Query, ReferenceConfig
from shared.runtime.errors import ConfigError
from shared.wire.errors import WireError
from shared.wire.journal import Batch, Member
from shared.wire.trajectory import Sequence, Trajectory

_MAX_CANDIDATES = 400


@dataclass(frozen=True)
class Token:
    """One row of the explanation; log-probs in nats."""

    position: int
    token_id: int
    text: str
    sampled: bool
    turn: int = -1
    version: int = -1
    age: int = 0
    sampler: float = 0.0
    old: float = 0.0
    reference: float = math.nan
    """Under its own version, by the audit's forward; NaN when it is not at hand."""
    current: float = math.nan
    """Under the version the batch stepped from."""

    @property
    def log_d(self) -> float:
        return self.old - self.sampler

    @property
    def log_s(self) -> float:
        return self.current - self.old


@dataclass(frozen=True)
class Explained:
    """A trajectory and how it was trained."""

    ticket_id: str
    group_id: str
    batch_version: int
    issue_version: int
    versions: tuple[int, ...]
    reward: float
    advantage: float
    status: str
    pods: tuple[str, ...]
    switch_inside_turn: bool
    tokens: tuple[Token, ...]


def explain(records: RunRecords, ledger: Ledger) -> Explained | None:
    """Pick the most telling trained trajectory and explain it; None when nothing was trained."""
    best: tuple[tuple[float, ...], Batch, Member] | None = None
    for batch, member in _candidates(records, ledger):
        rank = _rank(records, member)
        if best is None or rank > best[0]:
            best = (rank, batch, member)
    if best is None:
        return None
    _, batch, member = best
    return _explain(records, batch, member)


def _candidates(records: RunRecords, ledger: Ledger) -> Iterator[tuple[Batch, Member]]:
    """Yield members of the later half first that several versions sampled, then others."""
    rows = [
        (batch, member)
        for batch in ledger.lineage
        for group in batch.groups
        if not group.no_loss
        for member in group.members
        if member.terminal_seq in records.terminals and member.score_seq in records.scores
    ]
    middle = len(ledger.lineage) * 2 // 3
    rows.sort(
        key=lambda row: (
            len(records.terminals[row[1].terminal_seq].version_tokens) < 2,
            abs(row[0].version - middle),
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


def _explain(records: RunRecords, batch: Batch, member: Member) -> Explained:
    terminal = records.terminal(member.terminal_seq)
    score = records.score(member.score_seq)
    assert isinstance(terminal.outcome, Trajectory)
    sequence = terminal.outcome.sequences[0]
    ids = sequence.token_ids.numpy()
    version_at = {p: span.version for span in sequence.spans for p in range(span.start, span.stop)}
    turn_at = {p: n for n, t in enumerate(sequence.turns) for p in range(t.start, t.stop)}
    sampler = sequence.arrays["sampler_logprobs"].numpy()
    old = score.sequences[0].old_logprobs.numpy()
    reference, current = _rescored(records, batch.version, member.ticket_id, sequence)
    text = _decoder(records)
    tokens = tuple(
        Token(
            position=position,
            token_id=int(token_id),
            text=text(int(token_id)),
            sampled=position in version_at,
            turn=turn_at.get(position, -1),
            version=version_at.get(position, -1),
            age=batch.version - version_at.get(position, batch.version),
            sampler=float(sampler[position]),
            old=float(old[position]),
            reference=reference.get(position, math.nan),
            current=current.get(position, math.nan),
        )
        for position, token_id in enumerate(ids)
    )
    return Explained(
        ticket_id=terminal.ticket_id,
        group_id=terminal.group_id,
        batch_version=batch.version,
        issue_version=terminal.issue_version,
        versions=tuple(sorted(set(version_at.values()))),
        reward=member.reward,
        advantage=member.advantage,
        status=terminal.outcome.status,
        pods=tuple(dict.fromkeys(pod for turn in sequence.turns for pod in turn.pods)),
        switch_inside_turn=_switches_inside_turn(sequence),
        tokens=tokens,
    )


def _rescored(
    records: RunRecords, batch_version: int, ticket_id: str, sequence: Sequence
) -> tuple[dict[int, float], dict[int, float]]:
    """Return log-probs by position under each token's own version, and under the batch's."""
    own: dict[int, float] = {}
    current: dict[int, float] = {}
    try:
        rescoring = Rescoring(records, ReferenceConfig.read(records.model_dir()))
    except (ValueError, ConfigError):
        return own, current
    spans = [(span.version, np.arange(span.start, span.stop)) for span in sequence.spans]
    for version in sorted({version for version, _ in spans} | {batch_version}):
        policy = rescoring.policy(version)
        if policy is None:
            continue
        for stamped, positions in spans:
            temperature = rescoring.temperature(ticket_id, sequence, int(positions[0]))
            query = Query(sequence.token_ids.numpy(), positions, temperature)
            if version not in (stamped, batch_version):
                continue
            values = dict(zip(positions.tolist(), policy.logprobs([query])[0], strict=True))
            if version == stamped:
                own |= values
            if version == batch_version:
                current |= values
    return own, current


def _decoder(records: RunRecords) -> Callable[[int], str]:
    """Return id -> text by the model's tokenizer, or the id in brackets without one."""
    try:
        from tokenizers import Tokenizer

        tokenizer = cast(Any, Tokenizer).from_file(str(records.model_dir() / "tokenizer.json"))
    except Exception:  # noqa: BLE001 - not installed, or a file it cannot read: it raises no less
        return lambda token_id: f"[{token_id}]"

    def text(token_id: int) -> str:
        decoded = str(tokenizer.decode([token_id], skip_special_tokens=False))
        return decoded or str(tokenizer.id_to_token(token_id) or f"[{token_id}]")

    return text
