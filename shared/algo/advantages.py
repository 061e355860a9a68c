"""Group-relative advantages, and which members of a group enter the loss.

Shapes: G members of one group (same prompt). Credit per turn: `turn_credit`.

A further estimator is one more function and one more entry in `ADVANTAGES`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch


class Advantage(Protocol):
    """Rewards of the members that have one -> their advantages."""

    def __call__(self, rewards_G: torch.Tensor) -> torch.Tensor:
        """Return [G] advantages; 0 for a group of one, which has nothing to compare with."""
        ...


def dr_grpo(rewards_G: torch.Tensor) -> torch.Tensor:
    """Return r - mean (Dr. GRPO, arXiv 2503.20783; prime-rl)."""
    return rewards_G - rewards_G.mean()


def grpo(rewards_G: torch.Tensor, *, eps: float = 1e-6) -> torch.Tensor:
    """Return (r - mean)/(std + eps), std with G-1 (GRPO, arXiv 2402.03300; verl's ddof and eps).

    TRL: eps 1e-4. A group of one gets 0 (verl: its raw score).
    """
    if rewards_G.shape[0] < 2:
        return torch.zeros_like(rewards_G)
    return (rewards_G - rewards_G.mean()) / (rewards_G.std(correction=1) + eps)


def rloo(rewards_G: torch.Tensor) -> torch.Tensor:
    """Return r_i - mean of the others = G/(G-1)·(r - mean) (RLOO, arXiv 2402.14740)."""
    size = rewards_G.shape[0]
    return (rewards_G - rewards_G.mean()) * (size / max(1, size - 1))


ADVANTAGES: Mapping[str, Advantage] = {"dr_grpo": dr_grpo, "grpo": grpo, "rloo": rloo}
"""By the name in `algo.advantage`: the estimators that need one group only."""


@dataclass(frozen=True)
class GroupAdvantages:
    """The verdict on one group."""

    values: tuple[float, ...]
    """One per member; 0 where `has_loss` is False."""
    has_loss: tuple[bool, ...]
    """Whether the member's tokens enter loss and denominator."""
    verdict: Literal["ok", "too_few", "zero_variance"]
    version_span: int | None = None
    """Largest minus smallest behaviour version over the members of the baseline; None: unknown.
    The baseline is independent of the action, so a span biases nothing; it is logged."""


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


@dataclass(frozen=True)
class GroupMember:
    """One member of a group, as it ended."""

    status: Literal["done", "truncated", "aborted", "resumed"]
    """truncated: by a turn or length limit; aborted: by infrastructure, or too stale; resumed:
    continued after an interruption, and done once finished."""
    reward: float | None = None
    """None: it received none (aborted, still running, truncated without a score)."""
    versions: tuple[int, int] | None = None
    """Smallest and largest version that sampled one of its tokens."""

    @property
    def baseline_reward(self) -> float | None:
        """The reward with which it enters baseline and loss; None: it enters neither.

        Raises:
            ValueError: a member that is done and has no reward.
        """
        if self.status == "done" and self.reward is None:
            raise ValueError("a member that is done needs a reward; abort it if scoring failed")
        return None if self.status == "aborted" else self.reward


def member_advantages(members: Sequence[GroupMember], estimator: Advantage) -> GroupAdvantages:
    """Apply `group_advantages` to members by status, and report the version span.

    Whether a group is complete enough to be trained on at all (every member terminal, or a
    deadline with at least g_min of them) is decided where groups are gathered.
    """
    rewards = [member.baseline_reward for member in members]
    result = group_advantages(rewards, estimator)
    spans = [
        member.versions
        for member, reward in zip(members, rewards, strict=True)
        if reward is not None and member.versions is not None
    ]
    if not spans:
        return result
    span = max(high for _, high in spans) - min(low for low, _ in spans)
    return replace(result, version_span=span)


def batch_std(
    groups: Sequence[Sequence[float | None]], *, eps: float = 1e-6
) -> list[GroupAdvantages]:
    """Return (r - mean of the group)/(std of the batch + eps), std with N-1.

    The batch's standard deviation runs over the rewards of all groups that have a baseline,
    those of zero variance included (TRL `scale_rewards="batch"`, there with eps 1e-4; AReaL
    `std_level: batch`, eps 1e-5). The group rules apply as in `group_advantages`.
    """
    centred = [group_advantages(group, dr_grpo) for group in groups]
    pooled = [
        reward
        for group, result in zip(groups, centred, strict=True)
        if result.verdict != "too_few"
        for reward in group
        if reward is not None
    ]
    if len(pooled) < 2:
        return centred
    scale = float(torch.tensor(pooled, dtype=torch.float64).std(correction=1)) + eps
    return [replace(r, values=tuple(value / scale for value in r.values)) for r in centred]
