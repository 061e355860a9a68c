import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shared.algo import diagnostics

RATIOS = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)


def test_a_pair_by_hand():
    log2 = math.log(2)
    summary = diagnostics.pair_summary(RATIOS.log())
    want = {
        "mean": 3.5 / 3,
        "min": 0.5,
        "max": 2.0,
        "p50": 1.0,
        "abs_log_mean": 2 * log2 / 3,
        "abs_log_max": log2,
        "k1": 0.0,
        "k2": log2**2 / 3,
        "k3": 0.5 / 3,
        "chi2": 5.25 / 3 - 1,
        "ess": 3.5**2 / 5.25,
        "ess_ratio": 3.5**2 / 5.25 / 3,
        "std": math.sqrt(5.25 / 3 - (3.5 / 3) ** 2),
    }
    assert {key: summary[key] for key in want} == pytest.approx(want)


def test_equal_policies_diverge_by_nothing():
    summary = diagnostics.pair_summary(torch.zeros(7))
    assert (summary["k3"], summary["chi2"], summary["ess_ratio"]) == (0.0, 0.0, 1.0)


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=20))
def test_k3_is_never_negative_and_ess_lies_between_one_and_all(values: list[float]):
    log_r = torch.tensor(values, dtype=torch.float64)
    assert (diagnostics.k3(log_r) >= 0).all()
    assert 1 - 1e-9 <= float(diagnostics.ess(log_r)) <= len(values) * (1 + 1e-9)


def test_the_estimators_agree_with_the_exact_divergence():
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    q = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    exact = float((p * (p / q).log()).sum())
    log_r = (q / p).log()
    assert float((p * diagnostics.k1(log_r)).sum()) == pytest.approx(exact)
    assert float((p * diagnostics.k3(log_r)).sum()) == pytest.approx(exact)


def test_sequences_by_hand():
    log_r = torch.tensor([2.0, 2.0, 0.5], dtype=torch.float64).log()
    summary = diagnostics.sequence_summary(log_r, torch.tensor([7, 7, 9]))
    assert summary["seq_chi2"] == pytest.approx((16 + 0.25) / 2 - 1)
    assert summary["seq_ess"] == pytest.approx(4.5**2 / 16.25)
    assert summary["seq_ess_ratio"] == pytest.approx(4.5**2 / 16.25 / 2)
    assert summary["ppl_gap"] == pytest.approx((-math.log(2) + math.log(2)) / 2, abs=1e-12)
    assert summary["ppl_ratio"] == pytest.approx((0.5 + 2) / 2)


def test_per_age_sums_add_over_steps_and_fold_the_oldest():
    ages = torch.tensor([0, 2, 2, 9])
    values = {"k3_d": torch.tensor([1.0, 2.0, 4.0, 8.0])}
    sums = diagnostics.per_age(ages, values, num_ages=4)
    assert sums["age_count"].tolist() == [1, 0, 2, 1]
    assert sums["age_k3_d_sum"].tolist() == [1, 0, 6, 8]
    assert diagnostics.per_age(ages, values)["age_count"].tolist() == [1, 0, 2, 0, 0, 0, 0, 0, 0, 1]
    empty = diagnostics.per_age(ages[:0], {"k3_d": torch.zeros(0)}, num_ages=4)
    assert empty["age_k3_d_sum"].tolist() == [0, 0, 0, 0]


def test_staleness_and_mixing_by_hand():
    summary = diagnostics.staleness(
        torch.tensor([3, 3, 5, 4, 4]), torch.tensor([0, 0, 0, 8, 8]), version_now=6
    )
    assert summary == pytest.approx(
        {
            "staleness_mean": (3 + 3 + 1 + 2 + 2) / 5,
            "staleness_max": 3,
            "versions_per_trajectory": 1.5,
            "version_span_max": 2,
            "version_span_mean": 1.0,
            "mixed_version_ratio": 0.5,
        }
    )


def test_segments_end_at_environment_tokens_version_changes_and_sequences():
    mask = torch.tensor([0, 1, 1, 0, 1, 1, 1, 1])
    versions = torch.tensor([-1, 2, 2, -1, 2, 3, 3, 3])
    positions = torch.tensor([0, 1, 2, 3, 4, 5, 6, 0])
    assert diagnostics.segments(versions, mask, positions) == 4


def test_fractions_by_cause_by_hand():
    rejected = {
        "token_low": torch.tensor([1, 1, 0, 0, 0, 0, 0, 0]).bool(),
        "veto": torch.tensor([0, 1, 1, 0, 0, 0, 0, 0]).bool(),
    }
    cut = {"clip_high": torch.tensor([1, 0, 0, 1, 0, 0, 0, 0]).bool()}
    adv = torch.tensor([1.0, 1, 1, 1, 1, 1, 0, 0])
    assert diagnostics.fractions_by_cause(rejected, cut, adv) == pytest.approx(
        {
            "rej_token_low": 2 / 8,
            "rej_veto": 2 / 8,
            "rej_any": 3 / 8,
            "clip_high": 1 / 5,
            "contributing": 2 / 5,
            "zero_advantage": 2 / 5,
        }
    )


def test_a_scatter_sample_is_bounded_spread_and_repeatable():
    values = torch.arange(1000, dtype=torch.float64)
    sample = diagnostics.scatter_sample(values, -values, values.long(), size=5)
    assert sample.dtype == np.float32
    assert sample[:, 0].tolist() == [0, 250, 500, 749, 999]
    assert np.array_equal(sample, diagnostics.scatter_sample(values, -values, values, size=5))
    assert diagnostics.scatter_sample(values[:3], values[:3], values[:3], size=5).shape == (3, 3)


def test_probability_differences_by_hand():
    q, p = torch.tensor([0.5, 0.1]).double().log(), torch.tensor([0.2, 0.2]).double().log()
    assert diagnostics.prob_difference(q, p) == pytest.approx(
        {"abs_prob_diff_mean": 0.2, "abs_prob_diff_max": 0.3, "prob_diff_mean": 0.1}
    )


def test_weights_by_hand():
    d = torch.tensor([1.0, 2.0, 8.0], dtype=torch.float64)
    assert diagnostics.weight_summary(d.log(), d.clamp(max=2.0)) == pytest.approx(
        {"truncated_frac": 1 / 3, "eff_sample_ratio": (5 / 3) ** 2 / (9 / 3), "weight_max": 2.0}
    )
    low = d.float().log()
    assert diagnostics.weight_summary(low, low.exp())["truncated_frac"] == 0
    assert diagnostics.weight_summary(d.log(), 0 * d)["eff_sample_ratio"] == 0


def test_outside_the_clip_counts_both_sides_and_no_boundary():
    s = torch.tensor([0.79, 0.81, 1.0, 1.27, 1.29], dtype=torch.float64)
    hit = diagnostics.outside(s.log(), clip_low=0.2, clip_high=0.28)
    assert hit.tolist() == [True, False, False, False, True]


@given(st.floats(-2, 2), st.floats(0, 3), st.lists(st.integers(0, 9), min_size=2, max_size=9))
def test_the_slope_of_a_line_over_age_is_found_whatever_the_counts(
    slope: float, base: float, counts: list[int]
):
    count = np.array(counts, dtype=np.float64)
    total = count * (base + slope * np.arange(len(counts)))
    found = diagnostics.age_slope(count, total)
    if (count > 0).sum() < 2:
        assert found == {}
    else:
        assert found["slope"] == pytest.approx(slope, abs=1e-9)


def test_the_slope_is_that_of_the_tokens_not_of_the_ages():
    # means 0, 0, 3 of 1, 1, 2 tokens: centre 1.25, Σw(a - c)² = 2.75, Σw(a - c)·mean = 4.5
    found = diagnostics.age_slope(np.array([1.0, 1.0, 2.0]), np.array([0.0, 0.0, 6.0]))
    assert found["slope"] == pytest.approx(4.5 / 2.75)


def test_no_tokens_have_no_summary():
    none = torch.zeros(0)
    assert diagnostics.pair_summary(none) == {}
    assert diagnostics.sequence_summary(none, none.long()) == {}
    assert diagnostics.prob_difference(none, none) == {}
    assert diagnostics.weight_summary(none, none) == {}
    assert diagnostics.staleness(none.long(), none.long(), version_now=0) == {}
    assert diagnostics.fractions_by_cause({}, {}, none) == {}
