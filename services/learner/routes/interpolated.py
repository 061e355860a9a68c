"""`interp_prox_loglinear`, `interp_prox_linear`: a proxy between sampler and current policy.

No forward of its own: the loss computes the proxy from ℓ^inf and the ℓ it has anyway, weighted by
age (`shared/algo/proximal.py`). What the route hands over is ℓ^inf.
"""

from __future__ import annotations

from services.learner.routes.sampler import Rollout
from shared.algo.proximal import Proxy


class InterpLoglinear(Rollout):
    """log-linear: D̃ = ρ^α, S̃ = ρ^(1-α), α = (age-1)/age."""

    name = "interp_prox_loglinear"
    proxy: Proxy | None = "loglinear"


class InterpLinear(Rollout):
    """Linear in probabilities: D̃ = (1-α) + α·ρ."""

    name = "interp_prox_linear"
    proxy: Proxy | None = "linear"
