"""Objectives that act on each token's own ratio (`offpolicy.md` 4.1-4.3, 4.5-4.7, 4.11-4.12).

Shapes: T tokens. `log_r_T` is log S = ℓ - ℓ^old, or log ρ = ℓ - ℓ^inf where the objective is
anchored on the sampler, with the gradient of ℓ; `l_T` = ℓ; `adv_T` = A. The weight W of the
correction on D is not applied here. "sg" is stop-gradient. Log-ratios are clamped to ±20
before exp, as everywhere.

Objectives of the form -sg[c]·A·ℓ have the value of no surrogate, only its gradient: compare
their gradients, not their losses.
"""

from __future__ import annotations

import torch

from shared.algo.loss_terms import Terms
from shared.algo.losses import clip_causes, decoupled_ppo
from shared.algo.ratios import ratio


def ppo(
    log_r_T: torch.Tensor,
    adv_T: torch.Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual: float | None = 3.0,
) -> Terms:
    """Return -min(r·A, clip(r, 1-clip_low, 1+clip_high)·A), at most -dual·A where A < 0.

    `losses.decoupled_ppo` with W = 1. TRL's `delta` (clamp r from above before the min) is the
    same function as `dual = delta`; ROLL sets dual = 1 + 2·clip.
    """
    one_T = torch.ones_like(adv_T)
    loss_T = decoupled_ppo(log_r_T, one_T, adv_T, clip_low=clip_low, clip_high=clip_high, dual=dual)
    cut = clip_causes(log_r_T, adv_T, clip_low=clip_low, clip_high=clip_high, dual=dual)
    return Terms(loss_T, cut)


def score_function(
    coefficient_T: torch.Tensor, adv_T: torch.Tensor, l_T: torch.Tensor
) -> torch.Tensor:
    """Return -sg[c]·A·ℓ."""
    return -(coefficient_T * adv_T).detach() * l_T


def reinforce(
    l_T: torch.Tensor, log_r_T: torch.Tensor, adv_T: torch.Tensor, *, cap: float = 2.0
) -> Terms:
    """Return -sg[min(r, cap)]·A·ℓ (verl's bypass policy gradient; the stop-gradient is needed)."""
    r_T = ratio(log_r_T.detach())
    return Terms(
        score_function(r_T.clamp(max=cap), adv_T, l_T), truncated={"ratio_high": r_T > cap}
    )


def cispo(
    l_T: torch.Tensor,
    log_r_T: torch.Tensor,
    adv_T: torch.Tensor,
    *,
    clip_low: float = 1.0,
    clip_high: float = 4.0,
) -> Terms:
    """Return -sg[clip(r, 1-clip_low, 1+clip_high)]·A·ℓ (CISPO, arXiv 2506.13585).

    Canonically one-sided: clip_low >= 1 never binds. TRL's `epsilon_high` is the bound itself,
    1 + clip_high here. ROLL's unified mask, which zeroes the tokens that PPO would clip, is left
    out.
    """
    r_T = ratio(log_r_T.detach())
    low, high = 1.0 - clip_low, 1.0 + clip_high
    return Terms(
        score_function(r_T.clamp(low, high), adv_T, l_T),
        truncated={"ratio_low": r_T < low, "ratio_high": r_T > high},
    )


def topr(
    l_T: torch.Tensor, log_r_T: torch.Tensor, adv_T: torch.Tensor, score_T: torch.Tensor
) -> Terms:
    """Return -A·ℓ where score > 0, else -sg[clip(r, 0, 1)]·A·ℓ (TOPR, arXiv 2503.14286).

    ROLL's form when `log_r_T` is per token; the paper's when it is
    `sequence_objectives.sequence_log_ratio`. ROLL's two loss weights are left out.
    """
    r_T = ratio(log_r_T.detach())
    negative_T = score_T <= 0
    coefficient_T = torch.where(negative_T, r_T.clamp(0.0, 1.0), 1.0)
    return Terms(
        score_function(coefficient_T, adv_T, l_T),
        truncated={"ratio_high": negative_T & (r_T > 1.0)},
    )


def sapo(
    log_r_T: torch.Tensor,
    adv_T: torch.Tensor,
    *,
    tau_positive: float = 1.0,
    tau_negative: float = 1.05,
) -> Terms:
    """Return -A·(4/τ)·σ(τ·(r - 1)), τ by the sign of A (SAPO, arXiv 2511.20347).

    The gate's slope is 1 at r = 1 and fades on both sides: nothing is cut.
    """
    tau_T = torch.full_like(log_r_T, tau_negative).masked_fill(adv_T > 0, tau_positive)
    gate_T = torch.sigmoid(tau_T * (ratio(log_r_T) - 1.0)) * (4.0 / tau_T)
    return Terms(-adv_T * gate_T)


def double_sided(
    l_T: torch.Tensor,
    log_rho_T: torch.Tensor,
    adv_T: torch.Tensor,
    *,
    low: float = 0.2,
    high: float = 0.28,
) -> Terms:
    """Return -sg[ρ·1[1-low < ρ < 1+high]]·A·ℓ, the interval open (SkyRL `rollout_is`; GLM-5)."""
    rho_T = ratio(log_rho_T.detach())
    below_T, above_T = rho_T <= 1.0 - low, rho_T >= 1.0 + high
    weight_T = torch.where(below_T | above_T, 0.0, rho_T)
    return Terms(
        score_function(weight_T, adv_T, l_T), {"outside_low": below_T, "outside_high": above_T}
    )


def m2po_keep(log_r_T: torch.Tensor, m_T: torch.Tensor, *, threshold: float = 0.04) -> torch.Tensor:
    """Return bool[T]: drop loss tokens by falling log²r until the mean of the rest is < threshold.

    M2PO (arXiv 2510.01161) with r = π_θ/π_behaviour; AReaL's sort and mask agree when given this
    ratio (its caller gives it ℓ^inf - ℓ^prox instead). As in AReaL the smallest is kept even when
    it alone is not below. The mean is over the tokens of this call: a micro-batch masks by its
    own second moment.
    """
    mask_T = m_T.bool()
    rows_N = mask_T.nonzero()[:, 0]
    if rows_N.numel() == 0:
        return mask_T
    falling_N, order_N = torch.sort(log_r_T.detach()[rows_N].square(), descending=True, stable=True)
    total_N = falling_N.flip(0).cumsum(0).flip(0)
    count_N = torch.arange(falling_N.numel(), 0, -1, device=rows_N.device)
    below_N = (total_N / count_N < threshold).nonzero()[:, 0]
    drop = int(below_N[0]) if below_N.numel() else falling_N.numel() - 1
    keep_T = mask_T.clone()
    keep_T[rows_N[order_N[:drop]]] = False
    return keep_T


def m2po(
    log_r_T: torch.Tensor, adv_T: torch.Tensor, m_T: torch.Tensor, *, threshold: float = 0.04
) -> Terms:
    """Return -r·A on the tokens that `m2po_keep` keeps, 0 elsewhere (no clip, as in the paper)."""
    keep_T = m2po_keep(log_r_T, m_T, threshold=threshold)
    return Terms(torch.where(keep_T, -ratio(log_r_T) * adv_T, 0.0), {"m2po": m_T.bool() & ~keep_T})
