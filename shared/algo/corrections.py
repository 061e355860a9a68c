"""Corrections that act on the discrepancy ratio D alone: weights W and rejections.

Shapes: T tokens, B sequences. `log_d_T` is the raw, untruncated log D (detached); `m_T` the
ORIGINAL loss mask; `seq_T` i64, the sequence (or trajectory) of each token in 0..B-1. Every
mask is computed from these, before any truncation and whatever else was rejected
(`offpolicy.md` 2 and 3, order of operations as in millioniron/ROLL `infer_correction.py`).

A further correction is one more function and one more entry in `DISCREPANCIES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from shared.algo.ratios import SAFETY_BOUND, ratio


@dataclass(frozen=True)
class Layout:
    """Which tokens are loss tokens, and which sequence each belongs to."""

    m_T: torch.Tensor
    """bool: the original loss mask."""
    seq_T: torch.Tensor
    """i64."""
    num_sequences: int


@dataclass(frozen=True)
class Verdict:
    """What a correction decides; both parts detached."""

    weight_T: torch.Tensor
    """W = w(D). Where a cause rejects the token, its value is not used."""
    rejected: dict[str, torch.Tensor]
    """By cause, bool[T]: `token_low`, `token_high`, `seq`, `veto`."""


def sequence_sum(values_T: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Return [B] sums over each sequence's loss tokens."""
    total_B = values_T.new_zeros(layout.num_sequences)
    return total_B.index_add(0, layout.seq_T, torch.where(layout.m_T, values_T, 0.0))


def sequence_counts(layout: Layout, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Return [B] numbers of loss tokens n_i."""
    return sequence_sum(torch.ones_like(layout.seq_T, dtype=dtype), layout)


def tis_token(log_d_T: torch.Tensor, *, high: float = 2.0, low: float = 0.0) -> torch.Tensor:
    """Truncated importance sampling, W = clamp(D, low, high) (verl `rollout_is=token`, C = 2)."""
    return ratio(log_d_T).clamp(low, high)


def icepop(log_d_T: torch.Tensor, *, low: float = 0.5, high: float = 5.0) -> torch.Tensor:
    """IcePop: W = D inside [low, high] (inclusive), 0 outside (Ring-1T; NeMo-RL "icepop")."""
    d_T = ratio(log_d_T)
    return torch.where((d_T >= low) & (d_T <= high), d_T, 0.0)


def token_mask(log_d_T: torch.Tensor, *, low: float = 0.5, high: float = 2.0) -> torch.Tensor:
    """Keep iff low <= D <= high, on D = π_old/μ itself (verl's `token_k1` bounds 1/D)."""
    d_T = ratio(log_d_T)
    return (d_T >= low) & (d_T <= high)


def seq_tis(log_d_T: torch.Tensor, layout: Layout, *, high: float = 2.0) -> torch.Tensor:
    """Sequence-level truncated weight, W_i = min(Π D, high) on every token of the sequence."""
    product_B = torch.exp(sequence_sum(log_d_T, layout).clamp(-SAFETY_BOUND, SAFETY_BOUND))
    return product_B.clamp(max=high)[layout.seq_T]


def seq_mask(
    log_d_T: torch.Tensor,
    layout: Layout,
    *,
    low: float,
    high: float,
    kind: Literal["sum", "geo"] = "sum",
) -> torch.Tensor:
    """Keep a whole sequence iff low <= Π D <= high (`sum`) or its n-th root is (`geo`).

    The product grows with length (1.1^100 is about 13,780), the geometric mean does not.
    """
    log_B = sequence_sum(log_d_T, layout)
    if kind == "geo":
        log_B = log_B / sequence_counts(layout, log_B.dtype).clamp(min=1.0)
    value_B = ratio(log_B)
    return ((value_B >= low) & (value_B <= high))[layout.seq_T]


def veto(log_d_T: torch.Tensor, layout: Layout, *, threshold: float = 1e-4) -> torch.Tensor:
    """Keep a whole sequence unless any of its loss tokens has D < threshold (ROLL, slime)."""
    bad_T = (ratio(log_d_T) < threshold) & layout.m_T
    bad_B = sequence_sum(bad_T.to(log_d_T.dtype), layout) > 0
    return ~bad_B[layout.seq_T]


def weight_mean(
    weight_T: torch.Tensor, layout: Layout, *, level: Literal["token", "sequence"] = "token"
) -> torch.Tensor:
    """Return the mean weight over loss tokens, or over sequences of their mean (scalar).

    Rejected tokens count with the weight they carry (0 for IcePop).
    """
    if level == "token":
        return weight_T[layout.m_T].mean()
    counts_B = sequence_counts(layout, weight_T.dtype)
    used_B = counts_B > 0
    return (sequence_sum(weight_T, layout)[used_B] / counts_B[used_B]).mean()


def self_normalise(weight_T: torch.Tensor, mean: torch.Tensor | float) -> torch.Tensor:
    """Return W / mean(W); the caller all-reduces the mean over data-parallel ranks (verl)."""
    return weight_T / mean


Discrepancy = Callable[[torch.Tensor, Layout, float, float], Verdict]
"""(log_d_T, layout, low, high) -> verdict."""


def _icepop(log_d_T: torch.Tensor, layout: Layout, low: float, high: float) -> Verdict:
    return Verdict(icepop(log_d_T, low=low, high=high), _outside(log_d_T, layout, low, high))


def _tis(log_d_T: torch.Tensor, layout: Layout, low: float, high: float) -> Verdict:
    return Verdict(tis_token(log_d_T, low=low, high=high), {})


def _mask(log_d_T: torch.Tensor, layout: Layout, low: float, high: float) -> Verdict:
    return Verdict(ratio(log_d_T), _outside(log_d_T, layout, low, high))


def _none(log_d_T: torch.Tensor, layout: Layout, low: float, high: float) -> Verdict:
    return Verdict(ratio(log_d_T), {})


def _outside(
    log_d_T: torch.Tensor, layout: Layout, low: float, high: float
) -> dict[str, torch.Tensor]:
    d_T = ratio(log_d_T)
    return {"token_low": (d_T < low) & layout.m_T, "token_high": (d_T > high) & layout.m_T}


DISCREPANCIES: Mapping[str, Discrepancy] = {
    "icepop": _icepop,
    "tis": _tis,
    "mask": _mask,
    "none": _none,
}
"""By the name in `algo.discrepancy.kind`."""


def correct(
    log_d_T: torch.Tensor,
    layout: Layout,
    *,
    kind: str,
    low: float,
    high: float,
    veto_below: float | None = None,
) -> Verdict:
    """Apply one registered correction and the veto, both on untruncated D and original mask."""
    verdict = DISCREPANCIES[kind](log_d_T, layout, low, high)
    if veto_below is None:
        return verdict
    dropped_T = ~veto(log_d_T, layout, threshold=veto_below) & layout.m_T
    return Verdict(verdict.weight_T, {**verdict.rejected, "veto": dropped_T})
