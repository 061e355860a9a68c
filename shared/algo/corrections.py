"""Corrections that act on the discrepancy ratio D alone: weights W and rejections.

Shapes: T tokens, B sequences. `log_d_T` is the raw, untruncated log D; weights carry no
gradient. `layout.m_T` is the ORIGINAL loss mask. Every mask is computed from these, before any
truncation and whatever else was rejected (`offpolicy.md` 2 and 3, order of operations as in
millioniron/ROLL `infer_correction.py`). Masks are True where a token is kept; bounds are
inclusive.

Lists of corrections are put together in `composition`; the corrections whose unit is a run of
tokens are in `segments`. A further correction is one more function here or there, one more
dataclass in `correction_specs` and one more case in `composition`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from shared.algo.diagnostics import k2, k3
from shared.algo.layout import Layout as Layout
from shared.algo.layout import sequence_any, sequence_max, sequence_mean
from shared.algo.layout import sequence_counts as sequence_counts
from shared.algo.layout import sequence_sum as sequence_sum
from shared.algo.logprobs import wide
from shared.algo.ratios import SAFETY_BOUND, ratio


@dataclass(frozen=True)
class Verdict:
    """What a correction decides; all parts detached."""

    weight_T: torch.Tensor
    """W = w(D). Where a cause rejects the token, its value is not used."""
    rejected: dict[str, torch.Tensor]
    """By cause, bool[T], loss tokens only: `token_low`, `token_high`, `seq`, `veto`, ..."""
    truncated_T: torch.Tensor | None = None
    """bool: loss tokens whose weight a truncation changed; None: not computed."""


def _within(value: torch.Tensor, low: float, high: float) -> torch.Tensor:
    return (value >= low) & (value <= high)


def tis_token(log_d_T: torch.Tensor, *, high: float = 2.0, low: float = 0.0) -> torch.Tensor:
    """Truncated importance sampling, W = clamp(D, low, high) (verl `rollout_is=token`, C = 2).

    Two-sided as slime's `--tis-clip-low` and NeMo-RL's "tis"; low 0 is one-sided.
    """
    return ratio(log_d_T.detach()).clamp(low, high)


def seq_tis(log_d_T: torch.Tensor, layout: Layout, *, high: float = 2.0) -> torch.Tensor:
    """Sequence-level truncated weight, W_i = min(Π D, high) on every token of the sequence.

    verl `rollout_is=sequence` (2 to 10), SkyRL (5). The sum of log D is clamped to ±20.
    """
    return ratio(sequence_sum(log_d_T.detach(), layout)).clamp(max=high)[layout.seq_T]


def icepop(log_d_T: torch.Tensor, *, low: float = 0.5, high: float = 5.0) -> torch.Tensor:
    """IcePop: W = D inside [low, high], 0 outside (Ring-1T, arXiv 2510.18855; NeMo-RL)."""
    d_T = ratio(log_d_T.detach())
    return torch.where(_within(d_T, low, high), d_T, 0.0)


def token_mask(log_d_T: torch.Tensor, *, low: float = 0.5, high: float = 2.0) -> torch.Tensor:
    """Keep iff low <= D <= high, on D = π_old/μ itself (verl's `token_k1` bounds 1/D).

    millioniron/ROLL `enable_token_reject`; SkyRL's token mask (0.5, 2).
    """
    return _within(ratio(log_d_T.detach()), low, high)


def prob_diff_mask(
    l_old_T: torch.Tensor, l_inf_T: torch.Tensor, *, low: float = -0.2, high: float = 0.2
) -> torch.Tensor:
    """Keep iff low <= π_old - μ <= high (alibaba/ROLL filter `diff_low`, `diff_high`).

    Per token; ROLL's coarser aggregations of the difference are left out.
    """
    gap_T = torch.exp(wide(l_old_T.detach())) - torch.exp(wide(l_inf_T.detach()))
    return _within(gap_T, low, high)


def kpop_mask(
    l_old_T: torch.Tensor, l_inf_T: torch.Tensor, *, high: float, eps: float = 1e-6
) -> torch.Tensor:
    """Keep iff max(KL(p‖q), KL(q‖p)) <= high, p and q Bernoulli in π_old and μ of the token.

    KPop as verl reads it (`rollout_rs=binary_kl`, verl-project/verl 20c30bf): the region in D is
    wide where the token is improbable and narrow where it is certain. Probabilities are clamped
    to [eps, 1 - eps].
    """
    p_T = torch.exp(wide(l_old_T.detach())).clamp(eps, 1.0 - eps)
    q_T = torch.exp(wide(l_inf_T.detach())).clamp(eps, 1.0 - eps)
    log_T, log_not_T = torch.log(p_T / q_T), torch.log((1.0 - p_T) / (1.0 - q_T))
    forward_T = p_T * log_T + (1.0 - p_T) * log_not_T
    backward_T = -q_T * log_T - (1.0 - q_T) * log_not_T
    return torch.maximum(forward_T, backward_T) <= high


def seq_mask(
    log_d_T: torch.Tensor,
    layout: Layout,
    *,
    low: float,
    high: float,
    kind: Literal["sum", "geo"] = "sum",
) -> torch.Tensor:
    """Keep a whole sequence iff low <= Π D <= high (`sum`) or its n-th root is (`geo`).

    Seq-MIS and Geo-RS: verl's `seq_sum_k1` and `seq_mean_k1` bound the inverse; SkyRL's product
    and geometric masks; millioniron/ROLL "sequence" and "geometric". The product grows with
    length (1.1^100 is about 13,780), the geometric mean does not.
    """
    aggregate = sequence_mean if kind == "geo" else sequence_sum
    return _within(ratio(aggregate(log_d_T.detach(), layout)), low, high)[layout.seq_T]


Estimator = Literal["k2", "k3"]
Agg = Literal["token", "sum", "mean", "max"]


def kl_mask(
    log_d_T: torch.Tensor,
    layout: Layout,
    *,
    high: float,
    estimator: Estimator = "k3",
    agg: Agg = "mean",
) -> torch.Tensor:
    """Keep iff agg(½·log² D) (`k2`) or agg(D - 1 - log D) (`k3`) <= high.

    `token` decides per token, `sum`, `mean` and `max` per sequence over its loss tokens (verl
    `token_k2` to `seq_max_k3`; `seq_mean_k3` 0.001 to 0.01). log D is clamped to ±20 per token.
    """
    log_T = log_d_T.detach().clamp(-SAFETY_BOUND, SAFETY_BOUND)
    value_T = k2(log_T) if estimator == "k2" else k3(log_T)
    if agg == "token":
        return value_T <= high
    aggregate = {"sum": sequence_sum, "mean": sequence_mean, "max": sequence_max}[agg]
    return (aggregate(value_T, layout) <= high)[layout.seq_T]


def veto(
    log_d_T: torch.Tensor,
    layout: Layout,
    *,
    threshold: float = 1e-4,
    above: float | None = None,
) -> torch.Tensor:
    """Keep a whole sequence unless any of its loss tokens has D < threshold or D > above.

    One-sided: millioniron/ROLL `infer_catastrophic_threshold`, slime `rs_veto_threshold`.
    Two-sided: SkyRL's outlier mask, [1e-4, 100].
    """
    d_T = ratio(log_d_T.detach())
    bad_T = d_T < threshold
    if above is not None:
        bad_T = bad_T | (d_T > above)
    return ~sequence_any(bad_T, layout)[layout.seq_T]


def trm(
    log_d_T: torch.Tensor, layout: Layout, *, low: float = 0.5, high: float = 2.0
) -> torch.Tensor:
    """Keep a whole sequence iff low <= D <= high on all of its loss tokens.

    Trust region masking (arXiv 2512.23075), which bounds the largest divergence of a token; the
    region is stated in D here, with the bounds of `token_mask` as this project's default. With
    bounds (1/c, c) it is `kl_mask` by `max` of `k2` at ½·log² c.
    """
    return veto(log_d_T, layout, threshold=low, above=high)


@dataclass(frozen=True)
class WeightTotals:
    """Sum and count of a mean weight: add them over micro-batches and ranks."""

    total: torch.Tensor
    """Scalar."""
    count: torch.Tensor
    """Scalar: loss tokens, or sequences with one."""

    def __add__(self, other: WeightTotals) -> WeightTotals:
        return WeightTotals(self.total + other.total, self.count + other.count)

    @property
    def mean(self) -> torch.Tensor:
        """Scalar; 0 where nothing was counted."""
        return self.total / self.count.clamp(min=1.0)


def weight_totals(
    weight_T: torch.Tensor, layout: Layout, *, level: Literal["token", "sequence"] = "token"
) -> WeightTotals:
    """Sum weights over loss tokens, or their means over sequences with a loss token.

    Before rejection: rejected tokens count with the weight they carry (0 for IcePop), as verl's
    `rollout_is_batch_normalize`.
    """
    counts_B = sequence_counts(layout, weight_T.dtype)
    if level == "token":
        return WeightTotals(sequence_sum(weight_T, layout).sum(), counts_B.sum())
    used_B = (counts_B > 0).to(weight_T.dtype)
    return WeightTotals((sequence_mean(weight_T, layout) * used_B).sum(), used_B.sum())


def weight_mean(
    weight_T: torch.Tensor, layout: Layout, *, level: Literal["token", "sequence"] = "token"
) -> torch.Tensor:
    """Return the mean weight (scalar): `weight_totals` of one call."""
    return weight_totals(weight_T, layout, level=level).mean


def self_normalise(weight_T: torch.Tensor, mean: torch.Tensor | float) -> torch.Tensor:
    """Return W / mean(W); the caller all-reduces the mean over data-parallel ranks.

    verl `rollout_is_batch_normalize`, slime `tis_batch_normalize`; after truncation. A mean of
    at most 1e-8 (all weights 0) leaves W as it is, as in verl.
    """
    by = torch.as_tensor(mean, dtype=weight_T.dtype, device=weight_T.device)
    return weight_T / torch.where(by > 1e-8, by, 1.0)


def outside(
    log_d_T: torch.Tensor, layout: Layout, low: float, high: float
) -> dict[str, torch.Tensor]:
    """Return the loss tokens outside [low, high] by cause: `token_low`, `token_high`."""
    d_T = ratio(log_d_T.detach())
    return {"token_low": (d_T < low) & layout.m_T, "token_high": (d_T > high) & layout.m_T}
