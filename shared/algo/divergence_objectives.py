"""Objectives that mask by a change of probability rather than of ratio (`offpolicy.md` 4.8).

Shapes: T tokens. `l_T` = ℓ with gradient, `l_p_T` = log-prob of the anchor p (ℓ^inf, or ℓ^old),
`adv_T` = A. Per token the policy is seen as binary: the sampled token, or any other.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from shared.algo.loss_terms import Terms
from shared.algo.ratios import log_ratio, ratio
from shared.algo.staleness_objectives import score_function

SMALLEST_REST = 1e-8
"""1 - p and 1 - q are at least this inside the binary KL's logarithm. verl and SkyRL add it
instead, which moves the value where the formula needs no help."""


def binary_tv(l_T: torch.Tensor, l_p_T: torch.Tensor) -> torch.Tensor:
    """Return q - p, signed; its magnitude is the binary total variation."""
    return torch.exp(l_T) - torch.exp(l_p_T)


def binary_kl(l_T: torch.Tensor, l_p_T: torch.Tensor) -> torch.Tensor:
    """Return KL(p‖q) = p·log(p/q) + (1-p)·log((1-p)/(1-q)) of the two Bernoulli policies."""
    p_T, q_T = torch.exp(l_p_T).clamp(max=1.0), torch.exp(l_T).clamp(max=1.0)
    not_p_T, not_q_T = ((1.0 - x_T).clamp(min=SMALLEST_REST) for x_T in (p_T, q_T))
    return p_T * (l_p_T - l_T) + (1.0 - p_T) * torch.log(not_p_T / not_q_T)


def _tv_causes(
    l_T: torch.Tensor, l_p_T: torch.Tensor, adv_T: torch.Tensor, low: float, high: float
) -> dict[str, torch.Tensor]:
    change_T = binary_tv(l_T, l_p_T)
    return {
        "dppo_high": (adv_T > 0) & (change_T > high),
        "dppo_low": (adv_T <= 0) & (change_T < -low),
    }


def _kl_causes(
    l_T: torch.Tensor, l_p_T: torch.Tensor, adv_T: torch.Tensor, low: float, high: float
) -> dict[str, torch.Tensor]:
    divergence_T = binary_kl(l_T, l_p_T)
    return {
        "dppo_high": (adv_T > 0) & (l_T > l_p_T) & (divergence_T > high),
        "dppo_low": (adv_T <= 0) & (l_T < l_p_T) & (divergence_T > low),
    }


def _ipo_causes(
    l_T: torch.Tensor, l_p_T: torch.Tensor, adv_T: torch.Tensor, low: float, high: float
) -> dict[str, torch.Tensor]:
    change_T = binary_tv(l_T, l_p_T)
    return {"dppo_high": change_T > high, "dppo_low": change_T < -low}


_Causes = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, float, float], dict[str, torch.Tensor]
]


def _masked_reinforce(
    causes: _Causes,
    l_T: torch.Tensor,
    l_p_T: torch.Tensor,
    adv_T: torch.Tensor,
    low: float,
    high: float,
    cap: float,
) -> Terms:
    cut = causes(l_T.detach(), l_p_T, adv_T, low, high)
    r_T = ratio(log_ratio(l_T.detach(), l_p_T))
    keep_T = ~(cut["dppo_high"] | cut["dppo_low"])
    coefficient_T = torch.where(keep_T, r_T.clamp(max=cap), 0.0)
    return Terms(
        score_function(coefficient_T, adv_T, l_T), cut, {"ratio_high": keep_T & (r_T > cap)}
    )


def dppo_tv(
    l_T: torch.Tensor,
    l_p_T: torch.Tensor,
    adv_T: torch.Tensor,
    *,
    low: float = 0.2,
    high: float = 0.2,
    cap: float = 20.0,
) -> Terms:
    """Return -sg[min(q/p, cap)·keep]·A·ℓ; drop A > 0 with q-p > high, A <= 0 with q-p < -low.

    DPPO (arXiv 2602.04879) as verl's `dppo_tv`. SkyRL differentiates through the ratio, without
    a cap: the same gradient where the cap does not bind. The top-K divergences are left out; the
    authors found no gain.
    """
    return _masked_reinforce(_tv_causes, l_T, l_p_T, adv_T, low, high, cap)


def dppo_kl(
    l_T: torch.Tensor,
    l_p_T: torch.Tensor,
    adv_T: torch.Tensor,
    *,
    low: float = 0.05,
    high: float = 0.05,
    cap: float = 20.0,
) -> Terms:
    """As `dppo_tv` with the binary KL(p‖q), masked only where q has moved outward.

    Outward: up where A > 0 (bound `high`), down where A <= 0 (bound `low`). verl `dppo_kl`.
    """
    return _masked_reinforce(_kl_causes, l_T, l_p_T, adv_T, low, high, cap)


def _ratio_with_penalty(
    causes: _Causes,
    l_T: torch.Tensor,
    l_inf_T: torch.Tensor,
    adv_T: torch.Tensor,
    low: float,
    high: float,
    kappa: float,
) -> Terms:
    cut = causes(l_T.detach(), l_inf_T, adv_T, low, high)
    log_rho_T = log_ratio(l_T, l_inf_T)
    keep_T = ~(cut["dppo_high"] | cut["dppo_low"])
    policy_T = torch.where(keep_T, -adv_T * ratio(log_rho_T), 0.0)
    return Terms(policy_T + kappa * log_rho_T.square(), cut)


def prime_rl_default(
    l_T: torch.Tensor,
    l_inf_T: torch.Tensor,
    adv_T: torch.Tensor,
    *,
    low: float = 0.2,
    high: float = 0.2,
    kappa: float = 1e-3,
) -> Terms:
    """Return -A·ρ·keep + kappa·log²ρ, the mask of `dppo_tv` against the sampler.

    prime-rl's default loss at 559b447: the gradient flows through ρ; the penalty (Kimi-K2.5,
    arXiv 2602.02276, no ½) is on every loss token, also where the mask cuts. prime-rl sums over
    the global token count (`token_mean`). Its teacher term is left out.
    """
    return _ratio_with_penalty(_tv_causes, l_T, l_inf_T, adv_T, low, high, kappa)


def ipo(
    l_T: torch.Tensor,
    l_inf_T: torch.Tensor,
    adv_T: torch.Tensor,
    *,
    low: float = 0.1,
    high: float = 0.1,
    kappa: float = 1e-3,
) -> Terms:
    """As `prime_rl_default` with the mask |q - p| > 0.1 whatever the sign of A (prime-rl `ipo`)."""
    return _ratio_with_penalty(_ipo_causes, l_T, l_inf_T, adv_T, low, high, kappa)
