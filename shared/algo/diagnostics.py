"""What a step says about its ratios: KL estimates, ESS, staleness, fractions by cause.

Shapes: N loss tokens BEFORE rejection (already selected), A ages. Everything is detached and
computed in float64 (`offpolicy.md` 8). Names: `d` = μ→π_old, `s` = π_old→π_θ, `rho` = μ→π_θ.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from shared.algo.ratios import SAFETY_BOUND


def k1(log_r_N: torch.Tensor) -> torch.Tensor:
    """Return -log r per token: KL(p‖q) = E_p[k1] with r = q/p."""
    return -log_r_N


def k2(log_r_N: torch.Tensor) -> torch.Tensor:
    """Return ½·log² r per token."""
    return 0.5 * log_r_N.square()


def k3(log_r_N: torch.Tensor) -> torch.Tensor:
    """Return r - 1 - log r per token: unbiased for KL(p‖q) and never negative."""
    return torch.expm1(log_r_N) - log_r_N


def ess(log_r_N: torch.Tensor) -> torch.Tensor:
    """Return the effective sample size (Σr)²/Σr², in units of its inputs."""
    r_N = torch.exp(log_r_N.double().clamp(-SAFETY_BOUND, SAFETY_BOUND))
    return r_N.sum().square() / r_N.square().sum()


def pair_summary(log_r_N: torch.Tensor) -> dict[str, float]:
    """Summarise one ratio r = q/p over loss tokens; empty for no tokens."""
    if log_r_N.numel() == 0:
        return {}
    log_N = log_r_N.double()
    r_N = torch.exp(log_N)
    bounded_N = torch.exp(log_N.clamp(-SAFETY_BOUND, SAFETY_BOUND))
    quantiles = np.quantile(r_N.cpu().numpy(), (0.01, 0.5, 0.99))
    magnitude_N = log_N.abs()
    return {
        "mean": float(r_N.mean()),
        "std": float(r_N.std(correction=0)),
        "min": float(r_N.min()),
        "max": float(r_N.max()),
        "p1": float(quantiles[0]),
        "p50": float(quantiles[1]),
        "p99": float(quantiles[2]),
        "abs_log_mean": float(magnitude_N.mean()),
        "abs_log_max": float(magnitude_N.max()),
        "k1": float(k1(log_N).mean()),
        "k2": float(k2(log_N).mean()),
        "k3": float(k3(log_N).mean()),
        "chi2": float(bounded_N.square().mean() - 1.0),
        "ess": float(ess(log_N)),
        "ess_ratio": float(ess(log_N)) / log_N.numel(),
    }


def prob_difference(l_q_N: torch.Tensor, l_p_N: torch.Tensor) -> dict[str, float]:
    """Return mean, max and signed mean of q - p over loss tokens, as probabilities.

    Where a token is nearly certain its ratio says little and this difference says it all.
    """
    if l_q_N.numel() == 0:
        return {}
    change_N = torch.exp(l_q_N.detach().double()) - torch.exp(l_p_N.detach().double())
    return {
        "abs_prob_diff_mean": float(change_N.abs().mean()),
        "abs_prob_diff_max": float(change_N.abs().max()),
        "prob_diff_mean": float(change_N.mean()),
    }


def sequence_summary(log_r_N: torch.Tensor, seq_N: torch.Tensor) -> dict[str, float]:
    """Summarise r per sequence: chi² and ESS of the product, and the perplexity gap.

    `ppl_gap` = mean over sequences of (mean log p - mean log q): positive when q is less
    confident; `ppl_ratio` = mean of its exp (verl, slime).
    """
    if log_r_N.numel() == 0:
        return {}
    _, index_N = torch.unique(seq_N, return_inverse=True)
    count_B = torch.bincount(index_N).double()
    sum_B = torch.zeros_like(count_B).index_add(0, index_N, log_r_N.double())
    product_B = torch.exp(sum_B.clamp(-SAFETY_BOUND, SAFETY_BOUND))
    gap_B = -sum_B / count_B
    return {
        "seq_chi2": float(product_B.square().mean() - 1.0),
        "seq_ess": float(ess(sum_B)),
        "seq_ess_ratio": float(ess(sum_B)) / len(count_B),
        "ppl_gap": float(gap_B.mean()),
        "ppl_ratio": float(torch.exp(gap_B).mean()),
    }


def per_age(
    ages_N: torch.Tensor, values: Mapping[str, torch.Tensor], *, num_ages: int | None = None
) -> dict[str, np.ndarray]:
    """Return `age_count` and `age_<name>_sum` by age in versions, f64[A]: addable over steps.

    D by age is flat when old logits are exact; a slope of k3(D) is the signature of missing
    ones. Ages at or above `num_ages` fall into the last bin.
    """
    if ages_N.numel() == 0:
        size = num_ages or 1
        return {name: np.zeros(size) for name in ("age_count", *(f"age_{n}_sum" for n in values))}
    index_N = ages_N.clamp(min=0, max=None if num_ages is None else num_ages - 1)
    size = num_ages or int(index_N.max()) + 1
    counts_A = torch.bincount(index_N, minlength=size).double()
    sums = {
        f"age_{name}_sum": torch.bincount(index_N, weights=value.double(), minlength=size)
        for name, value in values.items()
    }
    return {"age_count": counts_A.cpu().numpy(), **{k: v.cpu().numpy() for k, v in sums.items()}}


def quantile_by_age(
    ages_N: torch.Tensor, values_N: torch.Tensor, quantile: float, *, num_ages: int | None = None
) -> np.ndarray:
    """Return a quantile of a value by age in versions, f64[A]; 0 at ages without tokens.

    Ages at or above `num_ages` fall into the last bin. Unlike the sums of `per_age` these do not
    add over steps.
    """
    ages = ages_N.clamp(min=0).cpu().numpy()
    size = num_ages or (int(ages.max()) + 1 if ages.size else 1)
    values, ages = values_N.double().cpu().numpy(), np.minimum(ages, size - 1)
    found_A = np.zeros(size)
    for age in np.unique(ages):
        found_A[age] = np.quantile(values[ages == age], quantile)
    return found_A


def staleness(
    versions_N: torch.Tensor, seq_N: torch.Tensor, *, version_now: int
) -> dict[str, float]:
    """Summarise ages and version mixing of the loss tokens.

    Args:
        versions_N: behaviour version stamps.
        seq_N: trajectory of each token.
        version_now: the learner's version when the step starts.
    """
    if versions_N.numel() == 0:
        return {}
    ages_N = (version_now - versions_N).double()
    _, index_N = torch.unique(seq_N, return_inverse=True)
    size = int(index_N.max()) + 1
    stamps_N = versions_N.long() - int(versions_N.min())
    span = int(stamps_N.max()) + 1
    # one number per (trajectory, version): unique rows of pairs take ten times as long
    pairs_P = torch.unique(index_N * span + stamps_N)
    distinct_B = torch.bincount(pairs_P // span, minlength=size)
    empty_B = torch.zeros(size, dtype=torch.int64, device=index_N.device)
    highest_B = empty_B.scatter_reduce(0, index_N, stamps_N, "amax", include_self=False)
    lowest_B = empty_B.scatter_reduce(0, index_N, stamps_N, "amin", include_self=False)
    return {
        "staleness_mean": float(ages_N.mean()),
        "staleness_max": float(ages_N.max()),
        "versions_per_trajectory": float(distinct_B.double().mean()),
        "version_span_max": float((highest_B - lowest_B).max()),
        "version_span_mean": float((highest_B - lowest_B).double().mean()),
        "mixed_version_ratio": float((distinct_B > 1).double().mean()),
    }


def segments(versions_T: torch.Tensor, m_T: torch.Tensor, positions_T: torch.Tensor) -> int:
    """Count maximal runs of loss tokens of one version (`offpolicy.md` 9.1)."""
    mask_T = m_T.bool()
    starts_T = mask_T.clone()
    continues_T = mask_T[1:] & mask_T[:-1] & (versions_T[1:] == versions_T[:-1])
    starts_T[1:] &= ~(continues_T & (positions_T[1:] > 0))
    return int(starts_T.sum())


def weight_summary(log_d_N: torch.Tensor, weight_N: torch.Tensor) -> dict[str, float]:
    """Summarise the weights W = w(D) that remain after truncation.

    `truncated_frac` is the share with W != D (IcePop's zeros are rejections and counted there:
    pass kept tokens only); `eff_sample_ratio` = 1/E[(W/mean W)²] is verl's
    `rollout_is_eff_sample_size`.
    """
    if weight_N.numel() == 0:
        return {}
    w_N = weight_N.double()
    d_N = torch.exp(log_d_N.double().clamp(-SAFETY_BOUND, SAFETY_BOUND))
    changed_N = (w_N - d_N).abs() > 1e-5 * d_N  # above float32 rounding of exp
    square = float(w_N.square().mean())
    return {
        "truncated_frac": float(changed_N.double().mean()),
        "eff_sample_ratio": float(w_N.mean()) ** 2 / square if square else 0.0,
        "weight_max": float(w_N.max()),
    }


def outside(log_s_N: torch.Tensor, *, clip_low: float, clip_high: float) -> torch.Tensor:
    """Return bool[N]: S outside [1-clip_low, 1+clip_high], whatever the sign of A.

    Its mean at the first minibatch of a step is `clipped_on_arrival`.
    """
    s_N = torch.exp(log_s_N.detach().double())
    return (s_N < 1.0 - clip_low) | (s_N > 1.0 + clip_high)


def age_slope(count_A: np.ndarray, sum_A: np.ndarray) -> dict[str, float]:
    """Return the least-squares slope of a per-age mean in age, weighted by tokens.

    For k3(D) it is 0 when old logits are exact, and positive when something newer stands for
    them. Empty when fewer than two ages have tokens.

    Args:
        count_A: tokens by age (`per_age`), summed over as many steps as wanted.
        sum_A: sums of the value by age.
    """
    ages_P = np.nonzero(count_A > 0)[0]
    if len(ages_P) < 2:
        return {}
    weight_P = count_A[ages_P]
    mean_P = sum_A[ages_P] / weight_P
    from_center_P = ages_P - np.average(ages_P, weights=weight_P)
    spread = float((weight_P * from_center_P**2).sum())
    slope = float((weight_P * from_center_P * mean_P).sum()) / spread
    return {"slope": slope, "youngest": float(mean_P[0]), "oldest": float(mean_P[-1])}


def fractions_by_cause(
    rejected: Mapping[str, torch.Tensor],
    cut: Mapping[str, torch.Tensor],
    adv_N: torch.Tensor,
) -> dict[str, float]:
    """Return `rej_*` over all loss tokens, and clip fractions over the survivors.

    Args:
        rejected: bool[N] by cause, overlapping allowed (`rej_any` is the union).
        cut: bool[N] by cause: where the trust region stops the gradient.
        adv_N: advantages; a survivor contributes when its advantage is not 0 and nothing cuts.
    """
    total = adv_N.numel()
    if total == 0:
        return {}
    any_N = torch.zeros(total, dtype=torch.bool, device=adv_N.device)
    fractions: dict[str, float] = {}
    for cause, where_N in rejected.items():
        any_N |= where_N
        fractions[f"rej_{cause}"] = float(where_N.sum()) / total
    fractions["rej_any"] = float(any_N.sum()) / total
    kept_N = ~any_N
    survivors = max(1, int(kept_N.sum()))
    cut_N = torch.zeros_like(any_N)
    for cause, where_N in cut.items():
        cut_N |= where_N
        fractions[cause] = float((where_N & kept_N).sum()) / survivors
    fractions["contributing"] = float((kept_N & ~cut_N & (adv_N != 0)).sum()) / survivors
    fractions["zero_advantage"] = float((kept_N & (adv_N == 0)).sum()) / survivors
    return fractions


def scatter_sample(
    log_d_N: torch.Tensor, log_s_N: torch.Tensor, ages_N: torch.Tensor, *, size: int
) -> np.ndarray:
    """Return f32[M, 3] of (log D, log S, age), M <= size tokens evenly spaced: deterministic."""
    total = log_d_N.numel()
    if total > size:
        pick_M = torch.linspace(0, total - 1, size, dtype=torch.float64).round().long()
        log_d_N, log_s_N, ages_N = log_d_N[pick_M], log_s_N[pick_M], ages_N[pick_M]
    stacked = torch.stack([log_d_N.float(), log_s_N.float(), ages_N.float()], dim=1)
    return stacked.cpu().numpy()
