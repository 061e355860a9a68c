"""Who gets how much of the reward: per trajectory or per turn, relative to the group. Pure.

Shapes: G members of a group, K turns of a member, sequences after one another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from services.learner.staging import CompleteGroup
from shared.algo.advantages import ADVANTAGES, GroupAdvantages, batch_std, group_advantages
from shared.algo.turn_credit import turn_advantages
from shared.runtime.algo_section import AlgoSection
from shared.wire.trajectory import Trajectory

Verdict = Literal["ok", "too_few", "zero_variance"]


@dataclass(frozen=True)
class GroupCredit:
    """The verdict on one group."""

    advantages: tuple[float, ...]
    """One per member; under credit per turn the mean over its turns with loss, for the reader."""
    turns: tuple[tuple[float | None, ...], ...] = ()
    """By member and turn; None: the turn's tokens leave the loss. (): `advantages` for all."""
    verdict: Verdict = "ok"


Credit = Callable[[Sequence[CompleteGroup]], list[GroupCredit]]
"""The groups of a batch -> their verdicts, in order."""


def make_credit(section: AlgoSection) -> Credit:
    """Return what `algo.advantage`, `algo.credit` and `algo.gamma` ask for."""
    if section.credit == "turn":
        return partial(_per_turn, section)
    if section.advantage == "batch_std":
        return lambda groups: [_of(one) for one in batch_std([_rewards(g) for g in groups])]
    estimator = ADVANTAGES[section.advantage]
    return lambda groups: [_of(group_advantages(_rewards(g), estimator)) for g in groups]


def turn_rewards(trajectory: Trajectory) -> tuple[float, ...]:
    """Return the reward of every turn, sequences after one another.

    What the environment gave for no turn in particular, `reward` less the sum, is the last one's.
    """
    given = [sum(turn.rewards.values()) for s in trajectory.sequences for turn in s.turns]
    if given:
        given[-1] += trajectory.reward - sum(given)
    return tuple(given)


def _per_turn(section: AlgoSection, groups: Sequence[CompleteGroup]) -> list[GroupCredit]:
    assert section.advantage != "batch_std", "refused by the configuration"
    estimator = ADVANTAGES[section.advantage]
    found: list[GroupCredit] = []
    for group in groups:
        rewards = [turn_rewards(member.trajectory) for member in group.members]
        result = turn_advantages(rewards, gamma=section.gamma, estimator=estimator)
        turns = tuple(
            tuple(value if loss else None for value, loss in zip(values, losses, strict=True))
            for values, losses in zip(result.values, result.has_loss, strict=True)
        )
        verdict: Verdict = "too_few" if len(rewards) < 2 else "zero_variance"
        if any(value is not None for member in turns for value in member):
            verdict = "ok"
        found.append(GroupCredit(tuple(_mean(member) for member in turns), turns, verdict))
    return found


def _of(result: GroupAdvantages) -> GroupCredit:
    return GroupCredit(result.values, verdict=result.verdict)


def _rewards(group: CompleteGroup) -> list[float]:
    return [member.trajectory.reward for member in group.members]


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else 0.0
