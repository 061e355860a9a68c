"""avg@k and pass@k of an evaluation that plays every task k times.

pass@k is the chance that at least one of k samples succeeds, estimated without bias from n >= k
samples of which c succeed: 1 - C(n-c, k) / C(n, k) (Chen et al. 2021, arXiv 2107.03374, eq. 1).
tau-bench's pass^k, the chance that all k do, is C(c, k) / C(n, k) (arXiv 2406.12045).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Figure:
    """A mean over tasks with its 95 % interval, tasks resampled."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class AtK:
    """One evaluation."""

    num_tasks: int
    """Tasks with at least k samples; the others are left out."""
    samples: int
    """k."""
    avg: Figure
    """Mean reward over the tasks, each task's samples averaged."""
    passes: Figure
    """pass@k."""
    all_pass: Figure
    """pass^k."""


def pass_at_k(num_samples: int, num_successes: int, k: int) -> float:
    """Return pass@k of one task.

    Raises:
        ValueError: k is not in 1..num_samples, or more successes than samples.
    """
    _check(num_samples, num_successes, k)
    return 1.0 - math.comb(num_samples - num_successes, k) / math.comb(num_samples, k)


def pass_hat_k(num_samples: int, num_successes: int, k: int) -> float:
    """Return pass^k of one task: all of k samples succeed.

    Raises:
        ValueError: as `pass_at_k`.
    """
    _check(num_samples, num_successes, k)
    return math.comb(num_successes, k) / math.comb(num_samples, k)


def at_k(
    task_indices: Sequence[int], rewards: Sequence[float], k: int, success: float = 1.0
) -> AtK | None:
    """Summarise an evaluation, None where no task was played k times.

    Args:
        task_indices: one per episode; a task comes as often as it was played.
        rewards: one per episode.
        k: samples.
        success: a reward from here on is a success.
    """
    by_task: dict[int, list[float]] = {}
    for index, reward in zip(task_indices, rewards, strict=True):
        by_task.setdefault(index, []).append(reward)
    played = [sample for sample in by_task.values() if len(sample) >= k]
    if not played:
        return None
    successes = [sum(r >= success for r in sample) for sample in played]
    counted = list(zip(played, successes, strict=True))
    return AtK(
        num_tasks=len(played),
        samples=k,
        avg=_figure([sum(sample) / len(sample) for sample in played]),
        passes=_figure([pass_at_k(len(s), c, k) for s, c in counted]),
        all_pass=_figure([pass_hat_k(len(s), c, k) for s, c in counted]),
    )


def _figure(values: list[float]) -> Figure:
    array = np.array(values)
    rng = np.random.default_rng(0)
    means = array[rng.integers(0, len(array), (_RESAMPLES, len(array)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Figure(float(array.mean()), float(low), float(high))


def _check(num_samples: int, num_successes: int, k: int) -> None:
    if not 1 <= k <= num_samples or not 0 <= num_successes <= num_samples:
        raise ValueError(f"pass@{k} of {num_successes} successes in {num_samples} samples")
