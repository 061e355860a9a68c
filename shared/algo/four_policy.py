"""The general loss of four policies; the usual objectives are its special cases.

μ (sampler) → π_old (trainer, behaviour version) → π_prox (trust-region anchor) → π_θ:

    L = -w(D)·u(S1)·min(S2·A, clip(S2, 1-ε_lo, 1+ε_hi)·A),   D·S1·S2 = ρ
    D = π_old/μ,  S1 = π_prox/π_old,  S2 = π_θ/π_prox

`offpolicy.md` 1.4; our own general form. Special cases, each a choice of what stands for π_old
and π_prox (tested as such):

    decoupled with exact old logits (arXiv 2605.12070)    π_prox = π_old, so S1 = 1, S2 = S
    three policies (Hilton et al., arXiv 2110.00641;      π_old missing: D·S1 = W = π_prox/μ in
    AReaL, verl decoupled)                                one weight (`three_policy`)
    bypass                                                π_prox = π_old = μ: W = 1, S2 = ρ
    current_recompute                                     π_prox = π_old = π_θ at step start

Shapes: T tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from shared.algo.loss_terms import Terms
from shared.algo.ratios import log_ratio, ratio
from shared.algo.staleness_objectives import ppo


@dataclass(frozen=True)
class FourPolicyRatios:
    """The three log-ratios of every token; 0 outside the loss mask and where not finite."""

    log_d_T: torch.Tensor
    """log π_old/μ. Detached."""
    log_s1_T: torch.Tensor
    """log π_prox/π_old. Detached."""
    log_s2_T: torch.Tensor
    """log π_θ/π_prox, with the gradient of ℓ."""
    finite_T: torch.Tensor
    """bool: all three are finite; a loss token where they are not must be rejected."""

    @property
    def log_rho_T(self) -> torch.Tensor:
        """Log ρ = log π_θ/μ, with the gradient of ℓ."""
        return self.log_d_T + self.log_s1_T + self.log_s2_T


def split_four(
    l_T: torch.Tensor,
    l_prox_T: torch.Tensor,
    l_old_T: torch.Tensor,
    l_inf_T: torch.Tensor,
    m_T: torch.Tensor,
) -> FourPolicyRatios:
    """Split the total ratio in three. Only `l_T` carries a gradient."""
    prox_T, old_T, inf_T = l_prox_T.detach(), l_old_T.detach(), l_inf_T.detach()
    log_d_T, log_s1_T = log_ratio(old_T, inf_T), log_ratio(prox_T, old_T)
    log_s2_T = log_ratio(l_T, prox_T)
    finite_T = torch.isfinite(log_d_T + log_s1_T + log_s2_T.detach())
    use_T = m_T.bool() & finite_T
    return FourPolicyRatios(
        log_d_T=torch.where(use_T, log_d_T, 0.0),
        log_s1_T=torch.where(use_T, log_s1_T, 0.0),
        log_s2_T=torch.where(use_T, log_s2_T, 0.0),
        finite_T=finite_T,
    )


def four_policy(
    ratios: FourPolicyRatios,
    adv_T: torch.Tensor,
    *,
    w_T: torch.Tensor | None = None,
    u_T: torch.Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual: float | None = None,
    max_ratio: float | None = None,
) -> Terms:
    """Return -w·u·min(S2·A, clip(S2)·A) per token.

    Args:
        ratios: from `split_four`.
        adv_T: A.
        w_T: w(D), from a correction; None: D itself.
        u_T: u(S1); None: S1 itself.
        clip_low: S2 is clipped from below at 1 - clip_low.
        clip_high: S2 is clipped from above at 1 + clip_high.
        dual: bound on L/(-A) before w·u, where A < 0; None: off.
        max_ratio: cap on ρ as openai/ppo-ewma's `imp_samp_max` (100 there): where ρ is above,
            the behaviour log-prob is raised to ℓ - log max_ratio, which scales the weight.
    """
    terms = ppo(ratios.log_s2_T, adv_T, clip_low=clip_low, clip_high=clip_high, dual=dual)
    weight_T = ratio(ratios.log_d_T) if w_T is None else w_T
    weight_T = weight_T * (ratio(ratios.log_s1_T) if u_T is None else u_T)
    truncated: dict[str, torch.Tensor] = {}
    if max_ratio is not None:
        excess_T = ratios.log_rho_T.detach() - math.log(max_ratio)
        weight_T = weight_T * torch.exp(-excess_T.clamp(min=0.0))
        truncated["ratio_high"] = excess_T > 0
    weighted = terms.times(weight_T)
    return Terms(weighted.loss_T, weighted.cut, truncated)


def three_policy(
    l_T: torch.Tensor,
    l_prox_T: torch.Tensor,
    l_inf_T: torch.Tensor,
    m_T: torch.Tensor,
    adv_T: torch.Tensor,
    *,
    weight_T: torch.Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    max_ratio: float | None = 100.0,
) -> Terms:
    """Return Hilton's decoupled loss, -W·min(S2·A, clip(S2)·A), W = π_prox/μ.

    What is left when the old logits are missing: discrepancy and staleness up to the anchor
    share one weight. openai/ppo-ewma `compute_losses` clips log S2, which is the same; its KL
    variant is ½·coefficient·log²S2 (`kl.kl_terms`, `k2`, against π_prox) instead of the clip.
    """
    ratios = split_four(l_T, l_prox_T, l_prox_T, l_inf_T, m_T)
    return four_policy(
        ratios,
        adv_T,
        w_T=weight_T,
        clip_low=clip_low,
        clip_high=clip_high,
        max_ratio=max_ratio,
    )
