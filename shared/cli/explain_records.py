"""From a run's records to one explained trajectory: its step, its numbers, what is missing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import cast

import numpy as np

from services.learner.config import LearnerConfig
from services.learner.staging import Scored
from shared.cli.explain_config import configuration, route_of
from shared.cli.explain_old import Old, RouteOld
from shared.cli.explain_policies import ArchivedPolicies, Logprobs
from shared.cli.explain_step import SequenceTrace, StepRebuilt
from shared.cli.explained import Explained, OldSource
from shared.cli.explained_rows import Sampled, rows
from shared.cli.records import RunRecords
from shared.cli.token_text import decoder
from shared.runtime.errors import ConfigError
from shared.wire.errors import WireError
from shared.wire.journal import Batch, Member, TrainedGroup
from shared.wire.messages import Terminal
from shared.wire.trajectory import Trajectory


@dataclass(frozen=True)
class Trained:
    """Where a trajectory was trained."""

    batch: Batch
    group: TrainedGroup
    member: Member


@dataclass
class _Numbers:
    """All that could be established about one trajectory's step."""

    old: Old = ()
    source: OldSource = "unknown"
    current: Logprobs = field(default_factory=Logprobs)
    traces: list[SequenceTrace] = field(default_factory=list[SequenceTrace])
    knows_current: bool = True
    notes: list[str] = field(default_factory=list[str])


def explain_terminal(
    records: RunRecords, seq: int, trained: Trained | None, *, fate: str
) -> Explained:
    """Explain one stored terminal.

    Args:
        records: of the run.
        seq: of the terminal.
        trained: where it was trained, None for one that no step took.
        fate: in a word.

    Raises:
        ConfigError: the stored terminal cannot be read.
    """
    try:
        terminal = records.terminal(seq)
    except (KeyError, WireError) as error:
        raise ConfigError(f"terminal {seq} cannot be read from the archive: {error}") from error
    head = Explained(
        ticket_id=terminal.ticket_id,
        attempt_id=terminal.attempt_id,
        group_id=terminal.group_id,
        purpose=terminal.purpose,
        fate=fate,
        status="failed",
        issue_version=terminal.issue_version,
        versions=(),
        notes=(),
    )
    if not isinstance(terminal.outcome, Trajectory):
        outcome = terminal.outcome
        detail = f" ({outcome.detail})" if outcome.detail else ""
        return replace(head, notes=(f"failed: {outcome.reason}{detail}; no tokens",))
    return _explain(records, replace(head, status=terminal.outcome.status), terminal, trained)


def _explain(
    records: RunRecords, head: Explained, terminal: Terminal, trained: Trained | None
) -> Explained:
    played = cast(Trajectory, terminal.outcome)
    batch = trained.batch if trained else None
    config, about = configuration(records, batch)
    policies = ArchivedPolicies(records)
    reference = policies.stamped(terminal.ticket_id, played)
    if trained is None:
        numbers = _untrained(records, terminal)
    else:
        numbers = _trained(records, terminal, trained, config, policies)
    notes = [*about, *numbers.notes, *policies.problems]
    bound = config.admission.max_staleness if config else None
    tokens = rows(
        played,
        text=decoder(records),
        sampled=Sampled(
            numbers.old,
            numbers.source,
            numbers.current,
            reference,
            numbers.traces if config else [],
            numbers.knows_current,
        ),
        trained=trained.group if trained else None,
        batch_version=batch.version if batch else None,
        max_staleness=bound,
        member=trained.member if trained else None,
    )
    algo = config.learner.algo if config and trained else None
    return replace(
        head,
        versions=tuple(sorted({s.version for q in played.sequences for s in q.spans})),
        reward=played.reward,
        advantage=trained.member.advantage if trained else float("nan"),
        pods=tuple(dict.fromkeys(p for q in played.sequences for t in q.turns for p in t.pods)),
        switch_inside_turn=any(
            turn.start < span.start < turn.stop
            for q in played.sequences
            for turn in q.turns
            for span in q.spans
        ),
        batch_version=batch.version if batch else None,
        route=route_of(records, config),
        old_source=numbers.source,
        corrections=tuple(spec.kind for spec in algo.corrections) if algo else (),
        objective=algo.objective.kind if algo else "",
        aggregation=algo.aggregation if algo else "",
        places=tuple(trace.place for trace in numbers.traces),
        notes=tuple(dict.fromkeys(notes)),
        tokens=tokens,
    )


def _untrained(records: RunRecords, terminal: Terminal) -> _Numbers:
    """Return the stored score, if there is one."""
    for seq, facts in records.scores.items():
        if facts.ticket_id == terminal.ticket_id:
            note = "no step trained it: no age, no current log-prob, no S"
            return _Numbers(records.score(seq).sequences, "archived", notes=[note])
    return _Numbers(notes=["no step trained it and no score is stored"])


def _trained(
    records: RunRecords,
    terminal: Terminal,
    trained: Trained,
    config: LearnerConfig | None,
    policies: ArchivedPolicies,
) -> _Numbers:
    batch, ticket_id = trained.batch, terminal.ticket_id
    route = RouteOld(route_of(records, config), batch.version, policies)
    own = joined(records, trained.member)
    numbers = _Numbers(route.of(own), route.source, notes=[route.note])
    asked: dict[str, Logprobs] = {}

    def current(ticket: str) -> Logprobs:
        if ticket not in asked:
            played = members[ticket].trajectory
            heat = config.sampling.temperature if config else None
            asked[ticket] = policies.under(batch.version, ticket, played, heat)
        return asked[ticket]

    members: dict[str, Scored] = {ticket_id: own}
    numbers.current = current(ticket_id)
    numbers.notes.append(
        f"current: recomputed by the audit's float64 forward under v{batch.version}, the version "
        "stepped from; the learner's own ℓ differs by its rounding"
    )
    if config is None or trained.group.no_loss:
        return numbers
    numbers.knows_current = _known(own.trajectory, numbers.current)
    step = StepRebuilt(config, route.proxy)
    try:
        members |= {m.ticket_id: joined(records, m) for g in batch.groups for m in g.members}
    except (KeyError, WireError) as error:
        numbers.notes.append(f"the step cannot be laid out again, a record is missing: {error}")
        return numbers
    if not numbers.knows_current and (route.proxy or step.needs_every_current):
        numbers.notes.append("without the current log-probs this route's old ones are unknown")
        numbers.source = "unknown"
        return numbers
    if config.learner.algo.objective.needs_prox:
        numbers.notes.append("the anchor of the clip is not archived: no mask, clip or gradient")
        return numbers
    old = _old_of_all(members, route, ticket_id, numbers.old, every=step.needs_every_old)
    if not _known(own.trajectory, [score.old_logprobs.numpy() for score in numbers.old]):
        numbers.source = "unknown"
        numbers.notes.append("old log-probs are missing: no mask, clip or gradient can be given")
        return numbers
    if not numbers.knows_current:
        # The masks need no ℓ: any number will do, and what depends on it is not shown.
        asked[ticket_id] = [s.old_logprobs.numpy().astype(np.float64) for s in numbers.old]
    numbers.traces = step.trace(
        batch, ticket_id, members, old, current, _reference(config, members, policies, ticket_id)
    )
    numbers.notes += _notes(records, config, batch, numbers)
    return numbers


def _old_of_all(
    members: Mapping[str, Scored], route: RouteOld, ticket_id: str, own: Old, *, every: bool
) -> dict[str, Old]:
    """Return old log-probs of the batch; others are computed only where they matter."""
    sampler = RouteOld("rollout", 0, cast(ArchivedPolicies, None))
    answer: Callable[[Scored], Old] = (
        route.of if every or route.source == "archived" else sampler.of
    )
    return {t: own if t == ticket_id else answer(member) for t, member in members.items()}


def _reference(
    config: LearnerConfig,
    members: Mapping[str, Scored],
    policies: ArchivedPolicies,
    ticket_id: str,
) -> dict[str, Logprobs] | None:
    """Return log-probs of the model that the run began with, where `algo.kl` is on."""
    if not config.learner.algo.kl.coefficient:
        return None
    found: dict[str, Logprobs] = {}
    for ticket, member in members.items():
        if ticket == ticket_id:
            values = policies.under(0, ticket, member.trajectory)
        else:
            values = [np.zeros(s.token_ids.shape[0]) for s in member.trajectory.sequences]
        found[ticket] = [np.nan_to_num(v) for v in values]
    return found


def _notes(
    records: RunRecords, config: LearnerConfig, batch: Batch, numbers: _Numbers
) -> list[str]:
    """Say what a reader must know to trust the numbers."""
    notes: list[str] = []
    late = sorted({t.place.minibatch for t in numbers.traces if t.place and t.place.minibatch})
    if late and numbers.knows_current:
        notes.append(
            f"its minibatch came after {late[-1]} optimizer step(s) inside the step: the weights "
            "its forward saw are not archived, so S, clip and gradient here are as of the version "
            "stepped from"
        )
    if not numbers.knows_current:
        notes.append("no current log-probs: S, clip and gradient are unknown")
    if config.learner.algo.entropy_bonus:
        notes.append("gradient: without the entropy bonus, which does not act through ℓ")
    if config.learner.algo.kl.coefficient:
        notes.append("gradient: contains the KL term, its reference recomputed under v0")
    report = records.steps.get(batch.version + 1)
    fallen = report.scalars.get("fallback_tokens", 0.0) if report else 0.0
    if fallen and numbers.source == "recomputed":
        notes.append(
            f"{fallen:.0f} tokens of this batch were trained with the fallback's old log-probs; "
            "which ones is not stored, here every token has its own version's"
        )
    return notes


def joined(records: RunRecords, member: Member) -> Scored:
    """Return what the learner joined.

    Raises:
        KeyError, WireError: a record is missing or unreadable.
    """
    outcome = records.terminal(member.terminal_seq).outcome
    if not isinstance(outcome, Trajectory):
        raise KeyError(member.ticket_id)
    stored = member.score_seq in records.scores
    return Scored(
        ticket_id=member.ticket_id,
        terminal_seq=member.terminal_seq,
        terminal_digest=member.terminal_digest,
        score_seq=member.score_seq,
        trajectory=outcome,
        scores=records.score(member.score_seq).sequences if stored else (),
    )


def _known(played: Trajectory, values: Logprobs) -> bool:
    return len(values) == len(played.sequences) and all(
        bool(np.isfinite(array[sequence.loss_mask.numpy().astype(bool)]).all())
        for sequence, array in zip(played.sequences, values, strict=True)
    )
