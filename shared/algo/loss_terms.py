"""What an objective returns per token, and what it is given.

Shapes: T tokens of the packed batch. Names as in `ratios`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from shared.algo.layout import Layout
from shared.algo.logprobs import wide


@dataclass(frozen=True)
class Terms:
    """Per-token loss and what shaped its gradient. Values outside the loss mask mean nothing."""

    loss_T: torch.Tensor
    """Carries the gradient, through the current log-probs only."""
    cut: Mapping[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])
    """By cause, bool[T]: where the policy term has no gradient."""
    truncated: Mapping[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])
    """By cause, bool[T]: where a bound changed the gradient's weight without removing it."""

    def times(self, weight_T: torch.Tensor) -> Terms:
        """Multiply the loss by a detached weight."""
        return Terms(weight_T.detach() * self.loss_T, self.cut, self.truncated)


@dataclass(frozen=True)
class Tokens:
    """The inputs of any objective. Build it with `Tokens.of`."""

    l_T: torch.Tensor
    """ℓ, with gradient."""
    l_old_T: torch.Tensor
    """ℓ^old, or what a route puts in its place. Detached."""
    l_inf_T: torch.Tensor
    """ℓ^inf. Detached."""
    adv_T: torch.Tensor
    weight_T: torch.Tensor
    """W of the correction on D. Detached."""
    layout: Layout
    """The original loss mask, before any rejection."""
    score_T: torch.Tensor | None = None
    """Raw reward of the token's trajectory, for kinds that need it."""
    l_prox_T: torch.Tensor | None = None
    """Of the trust-region anchor, for kinds that need it. Detached."""

    @classmethod
    def of(
        cls,
        l_T: torch.Tensor,
        l_old_T: torch.Tensor,
        l_inf_T: torch.Tensor,
        adv_T: torch.Tensor,
        weight_T: torch.Tensor,
        layout: Layout,
        score_T: torch.Tensor | None = None,
        l_prox_T: torch.Tensor | None = None,
    ) -> Tokens:
        """Detach, widen to at least float32, and make unusable tokens harmless.

        Outside the loss mask, and where any of the log-probs is not finite (which the caller
        rejects), all of them become 0: the ratios are 1 and no gradient flows.
        """
        now_T, old_T, inf_T = wide(l_T), wide(l_old_T.detach()), wide(l_inf_T.detach())
        prox_T = old_T if l_prox_T is None else wide(l_prox_T.detach())
        use_T = layout.m_T & torch.isfinite(now_T.detach() + old_T + inf_T + prox_T)
        return cls(
            l_T=torch.where(use_T, now_T, 0.0),
            l_old_T=torch.where(use_T, old_T, 0.0),
            l_inf_T=torch.where(use_T, inf_T, 0.0),
            adv_T=adv_T.detach().to(now_T.dtype),
            weight_T=weight_T.detach(),
            layout=layout,
            score_T=score_T,
            l_prox_T=None if l_prox_T is None else torch.where(use_T, prox_T, 0.0),
        )

    def anchor_logprobs(self, anchor: str) -> torch.Tensor:
        """Return ℓ^old (`old`) or ℓ^inf (`rollout`)."""
        return self.l_old_T if anchor == "old" else self.l_inf_T

    def log_ratio(self, anchor: str) -> torch.Tensor:
        """Return log S (`old`) or log ρ (`rollout`), with the gradient of ℓ."""
        return self.l_T - self.anchor_logprobs(anchor)
