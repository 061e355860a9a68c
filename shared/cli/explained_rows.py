"""The rows of one explained trajectory, from its arrays. Pure.

Shapes: T tokens of one sequence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from shared.cli.explain_policies import Logprobs
from shared.cli.explain_step import SequenceTrace
from shared.cli.explained import OldSource, Token
from shared.wire.journal import Member, TrainedGroup
from shared.wire.messages import SequenceScore
from shared.wire.trajectory import Span, Trajectory


@dataclass(frozen=True)
class Sampled:
    """Log-probs of a trajectory and what its step did with them, by sequence."""

    old: Sequence[SequenceScore]
    source: OldSource
    current: Logprobs
    reference: Logprobs
    traces: Sequence[SequenceTrace]
    """Empty where the step has no loss on it, or could not be laid out again."""
    knows_current: bool = True
    """False: what a trace says about S, clip and gradient means nothing."""


def rows(
    played: Trajectory,
    *,
    text: Callable[[int], str],
    sampled: Sampled,
    trained: TrainedGroup | None,
    batch_version: int | None,
    max_staleness: int | None,
    member: Member | None,
) -> tuple[Token, ...]:
    """Return every token of every sequence, in order.

    Args:
        played: the trajectory.
        text: of a token id.
        sampled: its numbers.
        trained: its group in the batch, None for one that no step took.
        batch_version: stepped from.
        max_staleness: the configured bound; tells over-age from other masked versions.
        member: the trajectory in the batch, None for one that no step took.
    """
    found: list[Token] = []
    first_turn = 0
    for number, sequence in enumerate(played.sequences):
        version_at = _at(sequence.spans)
        turn_at = {p: n for n, t in enumerate(sequence.turns) for p in range(t.start, t.stop)}
        mixed = set(_at(sequence.mixed_kv))
        sampler = sequence.arrays["sampler_logprobs"].numpy()
        old, status = _old(sampled, number)
        for position, token_id in enumerate(sequence.token_ids.numpy().tolist()):
            plain = Token(number, position, token_id, text(token_id), position in version_at)
            if not plain.sampled:
                found.append(plain)
                continue
            version = version_at[position]
            provenance = status.get(version, "")
            token = replace(
                plain,
                turn=turn_at.get(position, -1),
                version=version,
                age=None if batch_version is None else batch_version - version,
                sampler=float(sampler[position]),
                old=float(old[position]) if provenance not in ("", "unscorable") else math.nan,
                status=provenance,
                mixed_kv=position in mixed,
                current=float(sampled.current[number][position]) if sampled.current else math.nan,
                reference=float(sampled.reference[number][position]),
                masked=_masked(version, provenance, trained, batch_version, max_staleness),
                advantage=_advantage(member, first_turn + turn_at.get(position, 0)),
            )
            token = replace(token, log_d=token.old - token.sampler, log_s=token.current - token.old)
            if sampled.traces:
                token = _stepped(token, sampled.traces[number], sampled)
            found.append(token)
        first_turn += len(sequence.turns)
    return tuple(found)


def _advantage(member: Member | None, turn: int) -> float:
    """Return a token's advantage; NaN where there is none, or its turn left the loss."""
    if member is None:
        return math.nan
    if not member.turn_advantages:
        return member.advantage
    value = member.turn_advantages[turn]
    return math.nan if value is None else value


def _old(sampled: Sampled, number: int) -> tuple[npt.NDArray[np.floating], dict[int, str]]:
    """Return one sequence's old log-probs and their provenance by version."""
    if not sampled.old:
        return np.zeros(0), {}
    score = sampled.old[number]
    values = score.old_logprobs.numpy()
    if sampled.source in ("unknown", "interpolated"):  # the loss computes the latter
        values = np.full(len(values), np.nan)
    return values, {entry.version: entry.status for entry in score.versions}


def _stepped(token: Token, trace: SequenceTrace, sampled: Sampled) -> Token:
    """Add what the step did; D and S are then the loss's own."""
    at = token.position
    if not trace.loss_mask[at]:
        return token
    rejected = tuple(cause for cause, where in trace.rejected.items() if where[at])
    token = replace(
        token,
        in_loss=True,
        masked=(*token.masked, *rejected),
        weight=float(trace.weight[at]),
    )
    if sampled.source == "interpolated":
        token = replace(token, old=token.sampler + float(trace.log_d[at]))
    if "nonfinite" not in rejected:
        token = replace(token, log_d=float(trace.log_d[at]))
    if not sampled.knows_current:
        return token
    if "nonfinite" not in rejected:
        token = replace(token, log_s=float(trace.log_s[at]))
    return replace(
        token,
        clipped=tuple(cause for cause, where in trace.cut.items() if where[at]),
        truncated=bool(trace.truncated[at]),
        gradient=float(trace.gradient[at]),
        gradient_step=float(trace.gradient_step[at]),
    )


def _masked(
    version: int,
    provenance: str,
    trained: TrainedGroup | None,
    batch_version: int | None,
    max_staleness: int | None,
) -> tuple[str, ...]:
    """Return why a token is outside the loss mask; empty when it is in it, or was not trained."""
    if trained is None or batch_version is None:
        return ()
    causes: list[str] = [f"no_loss:{trained.no_loss}"] if trained.no_loss else []
    if version in trained.masked_versions:
        over_age = max_staleness is not None and batch_version - version > max_staleness
        inexact = provenance not in ("", "exact")
        causes += ["over_age"] if over_age else []
        causes += [provenance] if inexact else []
        # Masks are per group: another member's score of this version is not exact.
        causes += ["masked_in_group"] if not (over_age or inexact) else []
    return tuple(causes)


def _at(spans: Sequence[Span]) -> dict[int, int]:
    return {p: span.version for span in spans for p in range(span.start, span.stop)}
