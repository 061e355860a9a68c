"""Importance ratios in log space: discrepancy D, staleness S, total ρ = D·S.

Shapes: T tokens of the packed batch. Names follow `offpolicy.md` 1.2:
    l_inf_T  ℓ^inf, inference-side log-prob recorded when sampled
    l_old_T  ℓ^old, training-side log-prob at the same (behaviour) version
    l_T      ℓ, training-side current log-prob, carries gradient
    m_T      loss mask: 1 (True) iff the policy sampled the token

Source of the semantics: arXiv 2605.12070; the same expansion in SkyRL
(docs/content/docs/algorithms/off_policy_correction.mdx).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from shared.algo.logprobs import wide

SAFETY_BOUND = 20.0
"""Log-ratios are clamped to ±20 before exp, as verl and SkyRL do."""


@dataclass(frozen=True)
class Ratios:
    """The two log-ratios of every token; 0 outside the loss mask and where not finite."""

    log_d_T: torch.Tensor
    """log D = ℓ^old - ℓ^inf: same version, two engines. Detached, not clamped."""
    log_s_T: torch.Tensor
    """log S = ℓ - ℓ^old: same engine, two versions. Carries the gradient of ℓ, not clamped."""
    finite_T: torch.Tensor
    """bool: both ratios are finite; a loss token where they are not must be rejected."""


def log_ratio(l_q_T: torch.Tensor, l_p_T: torch.Tensor) -> torch.Tensor:
    """Return log(q/p), both operands upcast to at least float32 *before* subtracting."""
    return wide(l_q_T) - wide(l_p_T)


def ratio(log_ratio_T: torch.Tensor) -> torch.Tensor:
    """Return exp of a log-ratio clamped to ±`SAFETY_BOUND`."""
    return torch.exp(log_ratio_T.clamp(-SAFETY_BOUND, SAFETY_BOUND))


def split(
    l_T: torch.Tensor, l_old_T: torch.Tensor, l_inf_T: torch.Tensor, m_T: torch.Tensor
) -> Ratios:
    """Split the total ratio into discrepancy and staleness (`offpolicy.md` 1.3).

    For any detached substitute of ℓ^old, with nothing truncated or clipped, the gradient of
    -D·S·A in ℓ is -ρ·A whatever the substitute: routes differ only through masks, truncation
    and clipping.
    """
    mask_T = m_T.bool()
    old_T = l_old_T.detach()
    log_d_T = log_ratio(old_T, l_inf_T.detach())
    log_s_T = log_ratio(l_T, old_T)
    finite_T = torch.isfinite(log_d_T) & torch.isfinite(log_s_T.detach())
    use_T = mask_T & finite_T
    return Ratios(
        log_d_T=torch.where(use_T, log_d_T, 0.0),
        log_s_T=torch.where(use_T, log_s_T, 0.0),
        finite_T=finite_T,
    )
