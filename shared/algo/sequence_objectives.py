"""Objectives on the ratio of a whole sequence (`offpolicy.md` 4.4, 4.6, 4.9, 4.10, 4.13).

Shapes: T tokens, B sequences. `log_r_T` is log S or log ρ with the gradient of ℓ; sums and
means run over the loss tokens of `layout`, the ORIGINAL mask. A sequence must be whole inside a
call. In a trajectory of several versions log S takes each token's own version, so the mean mixes
ages; over a long multi-turn trajectory a product is dominated by length (9.6).
"""

from __future__ import annotations

import math

import torch

from shared.algo.layout import Layout, sequence_counts, sequence_mean, sequence_sum
from shared.algo.loss_terms import Terms
from shared.algo.ratios import SAFETY_BOUND, ratio
from shared.algo.staleness_objectives import score_function


def sequence_log_ratio(log_r_T: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Return [T]: log Π r over the token's sequence."""
    return sequence_sum(log_r_T, layout)[layout.seq_T]


def _clipped(s_T: torch.Tensor, adv_T: torch.Tensor, low: float, high: float) -> Terms:
    loss_T = torch.maximum(-adv_T * s_T, -adv_T * s_T.clamp(1.0 - low, 1.0 + high))
    fixed_T = s_T.detach()
    return Terms(
        loss_T,
        {
            "clip_high": (adv_T > 0) & (fixed_T > 1.0 + high),
            "clip_low": (adv_T < 0) & (fixed_T < 1.0 - low),
        },
    )


def gspo(
    log_r_T: torch.Tensor,
    adv_T: torch.Tensor,
    layout: Layout,
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
) -> Terms:
    """Return L_i = max(-A·s_i, -A·clip(s_i)) on every token, s_i = exp(mean of log r).

    GSPO (arXiv 2507.18071). A is the mean of the sequence's token advantages (AReaL). The value
    is the sequence's, so `seq_mean_token_mean` gives the paper's mean over sequences, with
    gradient -A·s_i/n_i in each token. A token rejected elsewhere takes its share of the loss
    away, but its log-prob keeps its gradient through s_i; `gspo_token` drops both.
    """
    s_B = ratio(sequence_mean(log_r_T, layout))
    adv_B = sequence_mean(adv_T, layout)
    return _clipped(s_B[layout.seq_T], adv_B[layout.seq_T], clip_low, clip_high)


def gspo_token(
    log_r_T: torch.Tensor,
    adv_T: torch.Tensor,
    layout: Layout,
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
) -> Terms:
    """As `gspo` with s_t = sg[s_i]·π_θ/sg[π_θ] and each token's own A (eq. 14-15; verl, SkyRL)."""
    mean_T = sequence_mean(log_r_T.detach(), layout)[layout.seq_T]
    s_T = ratio(mean_T + (log_r_T - log_r_T.detach()))
    return _clipped(s_T, adv_T, clip_low, clip_high)


def vespo_weight(
    log_w_T: torch.Tensor,
    adv_T: torch.Tensor,
    layout: Layout,
    *,
    k_positive: float = 2.0,
    lambda_positive: float = 3.0,
    k_negative: float = 3.0,
    lambda_negative: float = 2.0,
) -> torch.Tensor:
    """Return φ(w) = e^λ·w^k·e^(-λw) [T], detached; φ(1) = 1.

    w is the product over the sequence: each log-ratio clamped to ±20, the sum to
    [log 1e-8, 20] (the authors' code and TRL). (k, λ) by the sign of the token's A.
    """
    each_T = log_w_T.detach().clamp(-SAFETY_BOUND, SAFETY_BOUND)
    log_T = sequence_log_ratio(each_T, layout).clamp(math.log(1e-8), SAFETY_BOUND)
    up_T = adv_T >= 0
    k_T = torch.full_like(log_T, k_negative).masked_fill(up_T, k_positive)
    lambda_T = torch.full_like(log_T, lambda_negative).masked_fill(up_T, lambda_positive)
    return torch.exp(lambda_T + k_T * log_T - lambda_T * torch.exp(log_T))


def vespo(
    l_T: torch.Tensor,
    log_w_T: torch.Tensor,
    adv_T: torch.Tensor,
    layout: Layout,
    *,
    k_positive: float = 2.0,
    lambda_positive: float = 3.0,
    k_negative: float = 3.0,
    lambda_negative: float = 2.0,
) -> Terms:
    """Return -sg[φ(w)]·A·ℓ (VESPO, arXiv 2602.10693), w = Π ρ when given log ρ."""
    phi_T = vespo_weight(
        log_w_T,
        adv_T,
        layout,
        k_positive=k_positive,
        lambda_positive=lambda_positive,
        k_negative=k_negative,
        lambda_negative=lambda_negative,
    )
    return Terms(score_function(phi_T, adv_T, l_T))


def opsm_keep(
    log_r_T: torch.Tensor, adv_T: torch.Tensor, layout: Layout, *, delta: float = 1e-4
) -> torch.Tensor:
    """Return bool[T]: False where A < 0 and the sequence's mean of -log r exceeds delta.

    Off-policy sequence masking (DeepSeek-V3.2 eq. 9): r = π_θ/π_reference, the reference being
    the sampler (TRL) or the old policy (slime). With one advantage per sequence this drops it
    whole; with one per turn, its turns of negative advantage.
    """
    mean_T = sequence_mean(-log_r_T.detach(), layout)[layout.seq_T]
    return ~((adv_T < 0) & (mean_T > delta))


def vcpo_lr_scale(log_r_T: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Return √(ESS/B), ESS = (Σw)²/Σw² over sequences with a loss token, w = Π r.

    VCPO (arXiv 2602.17616): multiply the learning rate of the step by it.
    """
    used_B = sequence_counts(layout) > 0
    log_B = sequence_sum(log_r_T.detach(), layout)[used_B]
    w_B = ratio(log_B)
    return torch.sqrt(w_B.sum().square() / w_B.square().sum() / w_B.numel())


def vcpo_baseline(
    log_w_B: torch.Tensor, grad_square_norm_B: torch.Tensor, rewards_B: torch.Tensor
) -> torch.Tensor:
    """Return b* = Σw²‖g‖²R / Σw²‖g‖², the baseline of least variance (VCPO, arXiv 2602.17616)."""
    mass_B = ratio(log_w_B.detach()).square() * grad_square_norm_B
    return (mass_B * rewards_B).sum() / mass_B.sum()
