"""pass@k and pass^k: by enumeration, limits, and what an evaluation makes of them."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.algo.pass_at_k import at_k, pass_at_k, pass_hat_k


@given(
    st.integers(1, 8).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n)))
)
def test_both_are_the_shares_of_all_draws_of_k_samples(case: tuple[int, int, int]) -> None:
    num_samples, num_successes, k = case
    samples = [1] * num_successes + [0] * (num_samples - num_successes)
    draws = list(combinations(samples, k))
    assert pass_at_k(*case) == pytest.approx(sum(map(any, draws)) / len(draws))
    assert pass_hat_k(*case) == pytest.approx(sum(map(all, draws)) / len(draws))


def test_by_hand() -> None:
    # 4 samples, 1 success: two draws hit it with 1/2; both being it is impossible.
    assert pass_at_k(4, 1, 2) == pytest.approx(0.5)
    assert pass_hat_k(4, 1, 2) == 0.0
    assert pass_at_k(4, 1, 1) == pass_hat_k(4, 1, 1) == pytest.approx(0.25)


@pytest.mark.parametrize("case", [(4, 1, 5), (4, 5, 1), (4, 1, 0), (0, 0, 0)])
def test_impossible_cases_are_refused(case: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="pass@"):
        pass_at_k(*case)


def test_an_evaluation_is_summarised_by_task_and_tasks_played_too_seldom_are_left_out() -> None:
    indices = [0, 0, 1, 1, 2]
    rewards = [1.0, 0.0, 0.5, 0.5, 1.0]
    found = at_k(indices, rewards, 2, success=1.0)
    assert found is not None
    assert (found.num_tasks, found.samples) == (2, 2)
    assert found.avg.mean == pytest.approx(0.5)
    assert found.passes.mean == pytest.approx(0.5)
    assert found.all_pass.mean == 0.0
    assert found.passes.low <= found.passes.mean <= found.passes.high
    assert at_k(indices, rewards, 3) is None


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    import numpy as np

    rng = np.random.default_rng(1)
    inside = 0
    for _ in range(100):
        chances = rng.uniform(size=60)
        rewards = (rng.uniform(size=(60, 4)) < chances[:, None]).astype(float)
        found = at_k(np.repeat(np.arange(60), 4).tolist(), rewards.ravel().tolist(), 4)
        assert found is not None
        inside += found.avg.low <= 0.5 <= found.avg.high
    assert 85 <= inside <= 100
