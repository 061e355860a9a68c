"""Paired comparisons: sign-flip permutation, bootstrap, exact binomial, Holm. Pure numpy.

Shapes: P pairs, M tests.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FLIPS = 100_000
RESAMPLES = 10_000
EXHAUSTIVE_UP_TO = 16
"""Pairs: all 2^P sign patterns are then counted."""


@dataclass(frozen=True, slots=True)
class Paired:
    """The comparison of two methods over the same seeds."""

    num_pairs: int
    mean: float
    """Of the differences."""
    low: float
    high: float
    """95 % percentile bootstrap interval of the mean, not corrected."""
    p: float
    """Two-sided, sign-flip permutation."""


def paired(differences: Sequence[float], *, seed: int = 0) -> Paired:
    """Compare by the mean of paired differences.

    Raises:
        ValueError: no pair, or a difference that is not finite.
    """
    values_P = np.asarray(differences, dtype=np.float64)
    if not len(values_P) or not np.isfinite(values_P).all():
        raise ValueError(f"{len(values_P)} differences, not all finite: nothing to compare")
    low, high = bootstrap_interval(values_P, seed=seed)
    return Paired(
        len(values_P), float(values_P.mean()), low, high, sign_flip_p(values_P, seed=seed)
    )


def sign_flip_p(values_P: npt.NDArray[np.float64], *, seed: int = 0, flips: int = FLIPS) -> float:
    """Return the share of sign patterns whose |mean| is at least the observed one.

    Exhaustive for few pairs; otherwise (k + 1)/(flips + 1), which counts the observed pattern
    (Phipson and Smyth 2010).
    """
    count = len(values_P)
    observed = abs(float(values_P.sum()))
    slack = 1e-12 * max(1.0, float(np.abs(values_P).sum()))
    if count <= EXHAUSTIVE_UP_TO:
        patterns = np.arange(2**count)[:, None] >> np.arange(count) & 1
        sums = (1.0 - 2.0 * patterns) @ values_P
        return float(np.mean(np.abs(sums) >= observed - slack))
    rng = np.random.default_rng(seed)
    as_extreme = 0
    for start in range(0, flips, 10_000):
        size = min(10_000, flips - start)
        signs = rng.integers(0, 2, size=(size, count)) * 2.0 - 1.0
        as_extreme += int((np.abs(signs @ values_P) >= observed - slack).sum())
    return (as_extreme + 1) / (flips + 1)


def bootstrap_interval(
    values_P: npt.NDArray[np.float64], *, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Return the percentile interval of the mean under resampling of pairs."""
    rng = np.random.default_rng(seed)
    picks = rng.integers(0, len(values_P), size=(RESAMPLES, len(values_P)))
    tail = (1.0 - level) / 2.0
    low, high = np.quantile(values_P[picks].mean(1), (tail, 1.0 - tail))
    return float(low), float(high)


def mcnemar_p(only_first: int, only_second: int) -> float:
    """Return the exact two-sided p-value of discordant pairs: Binomial(n, 1/2)."""
    total = only_first + only_second
    if total == 0:
        return 1.0
    tail = sum(math.comb(total, k) for k in range(min(only_first, only_second) + 1))
    return min(1.0, 2.0 * tail / 2.0**total)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return adjusted p-values in the given order: reject where they are at most the level.

    Holm 1979: the k-th smallest of M is multiplied by M - k + 1, and none falls below an earlier
    one.
    """
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted = [0.0] * len(p_values)
    running = 0.0
    for rank, index in enumerate(order):
        running = max(running, min(1.0, (len(order) - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted
