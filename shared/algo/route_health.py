"""How far a route's old log-probs are from the exact ones, and what that changes.

Shapes: N loss tokens before rejection. ℓ̃ is what a route puts in the place of ℓ^old;
D̃ = exp(ℓ̃ - ℓ^inf), S̃ = exp(ℓ - ℓ̃) (`offpolicy.md` 5 and 8). Everything is detached, float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from shared.algo.diagnostics import per_age
from shared.algo.ewma_control import AnchorDecision


def route_error(
    l_route_N: torch.Tensor,
    l_exact_N: torch.Tensor,
    ages_N: torch.Tensor,
    *,
    num_ages: int | None = None,
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Return how far ℓ̃ is from ℓ^old: scalars, and sums by age that add over steps.

    Scalars: `error_mean`, `error_max`, `error_p99` of |ℓ̃ - ℓ^old|, and the signed `error_bias`.
    Arrays: `age_count`, `age_error_sum`, `age_bias_sum`.
    """
    gap_N = l_route_N.detach().double() - l_exact_N.detach().double()
    magnitude_N = gap_N.abs()
    arrays = per_age(ages_N.long(), {"error": magnitude_N, "bias": gap_N}, num_ages=num_ages)
    if gap_N.numel() == 0:
        return {}, arrays
    scalars = {
        "error_mean": float(magnitude_N.mean()),
        "error_max": float(magnitude_N.max()),
        "error_p99": float(np.quantile(magnitude_N.cpu().numpy(), 0.99)),
        "error_bias": float(gap_N.mean()),
    }
    return scalars, arrays


@dataclass(frozen=True)
class Decisions:
    """What one route decided about each token; bool[N] each."""

    rejected_N: torch.Tensor
    """By any mask on D̃."""
    cut_N: torch.Tensor
    """By the trust region on S̃."""


def wrong_decisions(exact: Decisions, route: Decisions) -> dict[str, torch.Tensor]:
    """Return bool[N] by kind: where a route decides otherwise than the exact one.

    `wrongly_rejected` and `wrongly_kept` are wrong masks; `wrongly_cut` and `wrongly_uncut` wrong
    clips, among tokens that both keep. No two kinds share a token.
    """
    both_N = ~exact.rejected_N & ~route.rejected_N
    return {
        "wrongly_rejected": route.rejected_N & ~exact.rejected_N,
        "wrongly_kept": exact.rejected_N & ~route.rejected_N,
        "wrongly_cut": both_N & route.cut_N & ~exact.cut_N,
        "wrongly_uncut": both_N & exact.cut_N & ~route.cut_N,
    }


def decision_differences(exact: Decisions, route: Decisions) -> dict[str, float]:
    """Return the shares of loss tokens by `wrong_decisions`; `wrong_any` is their union."""
    total = exact.rejected_N.numel()
    if total == 0:
        return {}
    wrong = wrong_decisions(exact, route)
    any_N = torch.stack(list(wrong.values())).any(0)
    shares = {name: float(where_N.sum()) / total for name, where_N in wrong.items()}
    return {**shares, "wrong_any": float(any_N.sum()) / total}


def noise_floor(log_s_N: torch.Tensor, ages_N: torch.Tensor) -> float | None:
    """Return the p99 of |log S| at age 0 before the first optimizer step; None without such tokens.

    There S is 1 but for layout noise: what no clip can tell from staleness.
    """
    fresh_N = log_s_N.detach().double()[ages_N == 0]
    return float(np.quantile(fresh_N.abs().cpu().numpy(), 0.99)) if fresh_N.numel() else None


def ewma_health(decision: AnchorDecision) -> dict[str, float]:
    """Return the state of an EWMA anchor as metrics; `ewma_resets_<cause>` are counters."""
    state = decision.state
    return {
        "ewma_age": state.age,
        "ewma_target_age": decision.target_age,
        "ewma_age_deficit": decision.age_deficit,
        "ewma_age_std": state.age_std,
        "ewma_keep": decision.keep,
        "ewma_worse_steps": float(state.worse_steps),
        **{f"ewma_resets_{cause}": float(n) for cause, n in sorted(state.resets.items())},
    }


def snapshot_health(hits: int, misses: int, *, resident_bytes: int) -> dict[str, float]:
    """Return how a step found its versions.

    Args:
        hits: versions of the batch that were there; each was loaded into the scorer once.
        misses: versions that were gone for good.
        resident_bytes: of the history, without the scorer.
    """
    asked = hits + misses
    return {
        "snapshot_loads": float(hits),
        "snapshot_misses": float(misses),
        "snapshot_hit_ratio": hits / asked if asked else 1.0,
        "snapshot_resident_bytes": float(resident_bytes),
    }
