"""Paired statistics on values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from shared.cli.bench_routes_statistics import (
    bootstrap_interval,
    holm,
    mcnemar_p,
    paired,
    sign_flip_p,
)


def test_few_pairs_are_permuted_exhaustively() -> None:
    # of the 8 patterns of (1, 2, 3) only +++ and --- reach |sum| = 6
    assert sign_flip_p(np.array([1.0, 2.0, 3.0])) == 2 / 8
    # |sum| >= 4 of (1, 2, 3 with the sign of 1 flipped): +++, -++ and their mirrors
    assert sign_flip_p(np.array([-1.0, 2.0, 3.0])) == 4 / 8
    assert sign_flip_p(np.zeros(5)) == 1.0


def test_many_pairs_are_permuted_at_random_and_never_get_zero() -> None:
    assert sign_flip_p(np.full(30, 0.3)) == pytest.approx(1 / 100_001)
    rng = np.random.default_rng(1)
    ps = [sign_flip_p(rng.normal(size=20), flips=2000) for _ in range(200)]
    assert 0.02 < np.mean(np.array(ps) <= 0.1) < 0.18


def test_the_exact_binomial_of_discordant_pairs() -> None:
    assert mcnemar_p(0, 0) == 1.0
    assert mcnemar_p(0, 5) == pytest.approx(2 / 32)
    assert mcnemar_p(1, 5) == pytest.approx(2 * 7 / 64)
    assert mcnemar_p(3, 3) == 1.0


def test_holm_multiplies_steps_and_never_falls() -> None:
    # 0.01 x 4, 0.02 x 3, 0.03 x 2 = 0.06, 0.5 x 1
    assert holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_the_bootstrap_interval_of_a_normal_sample_is_about_two_standard_errors() -> None:
    values = np.random.default_rng(0).normal(0.2, 1.0, size=400)
    low, high = bootstrap_interval(values)
    error = values.std(ddof=1) / math.sqrt(400)
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.2 * error)
    assert bootstrap_interval(np.full(5, 0.3)) == pytest.approx((0.3, 0.3))


def test_a_comparison_is_the_same_every_time_and_refuses_what_it_cannot_compare() -> None:
    differences = [0.1, -0.2, 0.3, 0.4]
    assert paired(differences) == paired(differences)
    assert paired(differences).mean == pytest.approx(0.15)
    for bad in ([], [0.1, math.nan]):
        with pytest.raises(ValueError, match="nothing to compare"):
            paired(bad)
