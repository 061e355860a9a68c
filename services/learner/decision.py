"""Deciding a batch: advantages, masks, who carries no loss. Pure; journalled before its effect."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from services.learner.credit import Credit, GroupCredit
from services.learner.staging import CompleteGroup, Scored
from shared.wire.journal import Batch, Member, TrainedGroup

_NO_LOSS: dict[str, Literal["", "zero_variance", "too_few_members"]] = {
    "ok": "",
    "zero_variance": "zero_variance",
    "too_few": "too_few_members",
}


def decide_batch(
    groups: Sequence[CompleteGroup],
    *,
    version: int,
    epoch: int,
    seed: int,
    credit: Credit,
    max_staleness: int,
) -> Batch:
    """Return the journal entry of the step from `version`; replay reads it and decides nothing."""
    return Batch(
        version=version,
        epoch=epoch,
        seed=seed,
        groups=tuple(
            _decide_group(group, version, result, max_staleness)
            for group, result in zip(groups, credit(groups), strict=True)
        ),
    )


def unusable_versions(member: Scored, oldest_usable: int) -> set[int]:
    """Return token versions that leave the loss: over-age, or without an exact old log-prob."""
    stamped = {span.version for s in member.trajectory.sequences for span in s.spans}
    inexact = {
        entry.version for s in member.scores for entry in s.versions if entry.status != "exact"
    }
    return {version for version in stamped if version < oldest_usable} | inexact


def _decide_group(
    group: CompleteGroup, version: int, result: GroupCredit, max_staleness: int
) -> TrainedGroup:
    masked: set[int] = set()
    for member in group.members:
        masked |= unusable_versions(member, version - max_staleness)
    members = tuple(
        Member(
            ticket_id=member.ticket_id,
            terminal_seq=member.terminal_seq,
            terminal_digest=member.terminal_digest,
            score_seq=member.score_seq,
            reward=member.trajectory.reward,
            advantage=value,
            turn_advantages=turns,
        )
        for member, value, turns in zip(
            group.members,
            result.advantages,
            result.turns or ((),) * len(group.members),
            strict=True,
        )
    )
    return TrainedGroup(
        group_id=group.group_id,
        issue_version=group.issue_version,
        members=members,
        failed=group.failed,
        no_loss=_NO_LOSS[result.verdict],
        masked_versions=tuple(sorted(masked)),
    )
