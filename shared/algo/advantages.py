"""Group-relative advantages, and which members of a group enter the loss.

Shapes: G members of one group (same prompt).

A further estimator is one more function and one more entry in `ADVANTAGES`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch


class Advantage(Protocol):
    """Rewards of the members that have one -> their advantages."""

    def __call__(self, rewards_G: torch.Tensor) -> torch.Tensor:
        """Return [G] advantages; G >= 2."""
        ...


def dr_grpo(rewards_G: torch.Tensor) -> torch.Tensor:
    """Return r - mean (Dr. GRPO, arXiv 2503.20783; prime-rl)."""
    return rewards_G - rewards_G.mean()


def grpo(rewards_G: torch.Tensor, *, eps: float = 1e-6) -> torch.Tensor:
    """Return (r - mean)/(std + eps), std with G-1 (GRPO, arXiv 2402.03300; verl's ddof and eps)."""
    return (rewards_G - rewards_G.mean()) / (rewards_G.std(correction=1) + eps)


def rloo(rewards_G: torch.Tensor) -> torch.Tensor:
    """Return r_i - mean of the others = G/(G-1)·(r - mean) (RLOO, arXiv 2402.14740)."""
    size = rewards_G.shape[0]
    return (rewards_G - rewards_G.mean()) * (size / (size - 1))


ADVANTAGES: Mapping[str, Advantage] = {"dr_grpo": dr_grpo, "grpo": grpo, "rloo": rloo}
"""By the name in `algo.advantage`."""


@dataclass(frozen=True)
class GroupAdvantages:
    """The verdict on one group."""

    values: tuple[float, ...]
    """One per member; 0 where `has_loss` is False."""
    has_loss: tuple[bool, ...]
    """Whether the member's tokens enter loss and denominator."""
    verdict: Literal["ok", "too_few", "zero_variance"]


def group_advantages(rewards: Sequence[float | None], estimator: Advantage) -> GroupAdvantages:
    """Apply the group rules of `offpolicy.md` 9.7.

    Args:
        rewards: one per member; None for a member that failed or was aborted, which enters
            neither baseline nor loss. Truncated members carry their real reward.
        estimator: from `ADVANTAGES`.

    Returns:
        All zero and without loss when fewer than two members have a reward, or all rewards are
        equal: the group then leaves the denominator as well.

    Raises:
        ValueError: a reward that is not finite.
    """
    members = [i for i, reward in enumerate(rewards) if reward is not None]
    known_G = torch.tensor([r for r in rewards if r is not None], dtype=torch.float64)
    if not bool(torch.isfinite(known_G).all()):
        raise ValueError(f"rewards {list(rewards)} are not all finite; fail the member instead")
    size = len(rewards)
    if len(members) < 2:
        return GroupAdvantages((0.0,) * size, (False,) * size, "too_few")
    if bool((known_G == known_G[0]).all()):
        return GroupAdvantages((0.0,) * size, (False,) * size, "zero_variance")
    by_member = dict(zip(members, estimator(known_G).tolist(), strict=True))
    return GroupAdvantages(
        tuple(by_member.get(i, 0.0) for i in range(size)),
        tuple(i in by_member for i in range(size)),
        "ok",
    )
