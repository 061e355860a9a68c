"""Builders of wire objects for the learner's tests."""

from __future__ import annotations

import numpy as np

from services.learner.staging import ScoreArrived, TerminalArrived
from shared.wire.base import Array
from shared.wire.messages import SequenceScore, TaskRef, Ticket, VersionScore
from shared.wire.trajectory import Failure, SamplingParams, Sequence, Span, Trajectory


def sequence(versions: tuple[int, ...] = (0, 0), prompt: int = 2) -> Sequence:
    """A sequence of `prompt` prompt tokens and one sampled token per entry of `versions`."""
    total = prompt + len(versions)
    mask = np.zeros(total, dtype=np.uint8)
    mask[prompt:] = 1
    spans: list[Span] = []
    for offset, version in enumerate(versions):
        start = prompt + offset
        if spans and spans[-1].version == version:
            spans[-1] = Span(version=version, start=spans[-1].start, stop=start + 1)
        else:
            spans.append(Span(version=version, start=start, stop=start + 1))
    return Sequence(
        token_ids=Array.of(np.arange(total), "i4"),
        loss_mask=Array.of(mask, "u1"),
        spans=tuple(spans),
        arrays={"sampler_logprobs": Array.of(np.full(total, -1.0), "f4")},
    )


def trajectory(reward: float = 1.0, versions: tuple[int, ...] = (0, 0)) -> Trajectory:
    return Trajectory(
        status="done", reward=reward, sequences=(sequence(versions),), task_digest="d"
    )


def terminal(ticket_id: str, seq: int, outcome: Trajectory | Failure) -> TerminalArrived:
    return TerminalArrived(ticket_id, seq, f"digest{seq}", outcome)


def score_of(
    event: TerminalArrived, seq: int, status: str = "exact", **changes: object
) -> ScoreArrived:
    assert isinstance(event.outcome, Trajectory)
    scores = tuple(
        SequenceScore(
            old_logprobs=Array.of(np.full(s.token_ids.shape, -1.1), "f4"),
            versions=tuple(
                VersionScore(version=v, status=status)  # type: ignore[arg-type]
                for v in sorted({span.version for span in s.spans})
            ),
        )
        for s in event.outcome.sequences
    )
    fields: dict[str, object] = {
        "ticket_id": event.ticket_id,
        "seq": seq,
        "terminal_seq": event.seq,
        "terminal_digest": event.digest,
        "sequences": scores,
    }
    return ScoreArrived(**(fields | changes))  # type: ignore[arg-type]


def ticket(ticket_id: str, group_id: str = "g0", member: int = 0, **changes: object) -> Ticket:
    fields: dict[str, object] = {
        "ticket_id": ticket_id,
        "purpose": "train",
        "group_id": group_id,
        "member": member,
        "group_size": 2,
        "task": TaskRef(dataset="d", split="train", index=0, seed=0),
        "issue_version": 0,
        "min_version": 0,
        "deadline": 100.0,
        "sampling": SamplingParams(),
        "seed": 1,
    }
    return Ticket(**(fields | changes))  # type: ignore[arg-type]
