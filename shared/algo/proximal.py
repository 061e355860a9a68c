"""Interpolated proxies for missing old logits, and what they amount to.

A proxy takes ℓ^old's place between the sampler's ℓ^inf and the current ℓ, both detached. It
holds no information about π_old: clip and mask then constrain the one scalar ρ, with bounds that
`reparameterised` states (`offpolicy.md` 5.3; arXiv 2605.12070 for the claim).

Shapes: T tokens. α is per token. ℓ is that of the *current* forward, so S̃ changes within a
step (AReaL; A-3PO, arXiv 2512.06547, is the same with weight 1/a on the sampler).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from shared.algo.logprobs import wide

Proxy = Literal["loglinear", "linear"]


def alpha_by_age(ages_T: torch.Tensor, versions_T: torch.Tensor | None = None) -> torch.Tensor:
    """Return α = (a-1)/a in [0, 1], f64; 0 for a <= 0 and for unstamped tokens (version < 0).

    a = learner's version - token's version. At a = 1, α = 0: the proxy is the sampler itself.
    """
    age_T = ages_T.double()
    alpha_T = torch.where(age_T > 0, (age_T - 1.0) / age_T.clamp(min=1.0), 0.0)
    if versions_T is not None:
        alpha_T = torch.where(versions_T >= 0, alpha_T, 0.0)
    return alpha_T.clamp(0.0, 1.0)


def loglinear_proxy(
    l_T: torch.Tensor, l_inf_T: torch.Tensor, alpha_T: torch.Tensor
) -> torch.Tensor:
    """Return ℓ^inf + α·(ℓ - ℓ^inf), detached: D̃ = ρ^α, S̃ = ρ^(1-α)."""
    inf_T = wide(l_inf_T.detach())
    return inf_T + alpha_T.to(inf_T.dtype) * (wide(l_T.detach()) - inf_T)


def linear_proxy(
    l_T: torch.Tensor, l_inf_T: torch.Tensor, alpha_T: torch.Tensor, *, epsilon: float = 0.0
) -> torch.Tensor:
    """Return log[(1-α)·μ + α·π_θ + epsilon], detached: D̃ = (1-α) + α·ρ, S̃ = ρ/D̃.

    AReaL adds epsilon = 1e-10; 0 is computed in log space, where nothing underflows.
    """
    inf_T, now_T = wide(l_inf_T.detach()), wide(l_T.detach())
    alpha_T = alpha_T.to(inf_T.dtype)
    if epsilon:
        mixed_T = (1.0 - alpha_T) * torch.exp(inf_T) + alpha_T * torch.exp(now_T)
        return torch.log(mixed_T + epsilon)
    return torch.logaddexp(inf_T + torch.log1p(-alpha_T), now_T + torch.log(alpha_T))


@dataclass(frozen=True)
class Interval:
    """An interval of ρ; infinite or zero ends mean that the bound never acts."""

    low: float
    high: float

    def meet(self, other: Interval) -> Interval:
        """Return the intersection: what a token must satisfy to survive both."""
        return Interval(max(self.low, other.low), min(self.high, other.high))


@dataclass(frozen=True)
class Reparameterised:
    """What clip and mask on a proxy's S̃ and D̃ mean for ρ."""

    clip: Interval
    """1-ε_lo <= S̃ <= 1+ε_hi as an interval of ρ."""
    mask: Interval
    """l <= D̃ <= h as an interval of ρ."""

    @property
    def dead(self) -> tuple[str, ...]:
        """Which thresholds never bind: on each side the wider of the two."""
        names: list[str] = []
        for side, wider in (("low", min), ("high", max)):
            clip, mask = getattr(self.clip, side), getattr(self.mask, side)
            if clip != mask:
                names.append(f"{'clip' if wider(clip, mask) == clip else 'mask'}_{side}")
        return tuple(names)


def reparameterised(
    kind: Proxy,
    alpha: float,
    *,
    clip_low: float,
    clip_high: float,
    mask_low: float,
    mask_high: float,
) -> Reparameterised:
    """Return the intervals of ρ that clip and mask on the proxy are equivalent to.

    Log-linear: ρ in [(1-ε_lo)^(1/(1-α)), (1+ε_hi)^(1/(1-α))] and [l^(1/α), h^(1/α)]. Linear: the
    upper clip is (1+ε)(1-α)/(1-α(1+ε)) where α(1+ε) < 1, and otherwise never fires (ε = 0.2 with
    α = (a-1)/a: from age 6 on).

    Raises:
        ValueError: α outside [0, 1).
    """
    if not 0 <= alpha < 1:
        raise ValueError(f"alpha: {alpha} is not in [0, 1); at 1 the proxy is the current policy")
    bounds = (1.0 - clip_low, 1.0 + clip_high)
    masks = (mask_low, mask_high)
    if kind == "loglinear":
        clip = Interval(*(_power(x, 1.0 / (1.0 - alpha)) for x in bounds))
        mask = Interval(*((_power(x, 1.0 / alpha) if alpha else _always(x)) for x in masks))
    else:
        clip = Interval(*(_unmixed(x, alpha) for x in bounds))
        mask = Interval(
            *(max(0.0, 1.0 + (x - 1.0) / alpha) if alpha else _always(x) for x in masks)
        )
    return Reparameterised(clip, mask)


def _power(base: float, exponent: float) -> float:
    if base in (0.0, math.inf):
        return base
    log = math.log(base) * exponent
    return math.inf if log > 700 else math.exp(log)


def _unmixed(bound: float, alpha: float) -> float:
    """ρ at which ρ/((1-α) + α·ρ) reaches the bound."""
    return bound * (1.0 - alpha) / (1.0 - alpha * bound) if alpha * bound < 1 else math.inf


def _always(bound: float) -> float:
    """α = 0: D̃ = 1 whatever ρ is, and the mask holds 1 in its interior."""
    return 0.0 if bound < 1 else math.inf
