"""Credit per turn: reward-to-go, optionally relative to the group at the same step.

Shapes: K turns of one trajectory, T tokens, R turns of the packed batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from shared.algo.advantages import Advantage, group_advantages
from shared.algo.layout import Layout
from shared.algo.segments import turns


def reward_to_go(rewards_K: Sequence[float], *, gamma: float = 1.0) -> tuple[float, ...]:
    """Return G_k = r_k + gamma·G_{k+1} per turn.

    alibaba/ROLL `compute_agentic_reinforce_return`: the discount counts turns, not tokens.

    Raises:
        ValueError: gamma outside [0, 1].
    """
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma {gamma} must lie in [0, 1]")
    total, returns = 0.0, list[float]()
    for reward in reversed(rewards_K):
        total = reward + gamma * total
        returns.append(total)
    return tuple(reversed(returns))


@dataclass(frozen=True)
class TurnAdvantages:
    """The verdict on the turns of one group."""

    values: tuple[tuple[float, ...], ...]
    """By member and turn; 0 where `has_loss` is False. No turns for a member without rewards."""
    has_loss: tuple[tuple[bool, ...], ...]
    """Whether the turn's tokens enter loss and denominator."""


def turn_advantages(
    rewards: Sequence[Sequence[float] | None],
    *,
    gamma: float = 1.0,
    estimator: Advantage | None = None,
) -> TurnAdvantages:
    """Return reward-to-go per turn, optionally relative to the group at the same step index.

    Args:
        rewards: per member, the rewards of its turns; None for a member that failed.
        gamma: discount per turn.
        estimator: from `advantages.ADVANTAGES`, applied at step k to the G_k of the members
            that have a turn k (alibaba/ROLL `step_reinforce`; GiGPO, arXiv 2505.10978, groups
            by environment state instead, which is left out). A step with fewer than two such
            members, or with equal returns, gets A = 0 and no loss. None: A = G_k.

    Raises:
        ValueError: a reward that is not finite, or gamma outside [0, 1].
    """
    returns = [None if r is None else reward_to_go(r, gamma=gamma) for r in rewards]
    if estimator is None:
        values = tuple(() if r is None else r for r in returns)
        if not all(torch.isfinite(torch.tensor(v, dtype=torch.float64)).all() for v in values):
            raise ValueError(f"rewards {list(rewards)} are not all finite; fail the member instead")
        return TurnAdvantages(values, tuple((True,) * len(v) for v in values))
    steps = range(max((len(r) for r in returns if r is not None), default=0))
    by_step = [
        group_advantages(
            [r[k] if r is not None and k < len(r) else None for r in returns], estimator
        )
        for k in steps
    ]
    lengths = [0 if r is None else len(r) for r in returns]
    return TurnAdvantages(
        tuple(tuple(by_step[k].values[i] for k in range(n)) for i, n in enumerate(lengths)),
        tuple(tuple(by_step[k].has_loss[i] for k in range(n)) for i, n in enumerate(lengths)),
    )


def per_token(values_R: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Return [T] advantages, constant inside a turn (version changes included); 0 outside.

    Args:
        values_R: one per turn of the packed batch, in order of appearance.
        layout: of the original loss mask.

    Raises:
        ValueError: not one value per turn.
    """
    return turns(layout).spread(values_R)
