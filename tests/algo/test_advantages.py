import math
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shared.algo.advantages import (
    ADVANTAGES,
    GroupMember,
    batch_std,
    dr_grpo,
    group_advantages,
    grpo,
    member_advantages,
    rloo,
)
from shared.runtime.algo_section import AlgoSection

REWARDS = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0], dtype=torch.float64)


def test_the_estimators_by_hand():
    assert dr_grpo(REWARDS).tolist() == pytest.approx([0.4, -0.6, -0.6, 0.4, 0.4])
    assert rloo(REWARDS).tolist() == pytest.approx([0.5, -0.75, -0.75, 0.5, 0.5])
    std = math.sqrt(0.3)  # Σ(r - 0.6)² = 1.2 over 4
    assert grpo(REWARDS, eps=0.0).tolist() == pytest.approx((dr_grpo(REWARDS) / std).tolist())


@pytest.mark.parametrize("name", ADVANTAGES)
def test_a_group_of_one_has_nothing_to_compare_with(name: str):
    assert ADVANTAGES[name](REWARDS[:1]).tolist() == [0.0]


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=9), st.sampled_from(sorted(ADVANTAGES)))
def test_advantages_sum_to_zero_and_ignore_a_constant(values: list[float], name: str):
    rewards = torch.tensor(values, dtype=torch.float64)
    advantages = ADVANTAGES[name](rewards)
    scale = max(1.0, float(advantages.abs().max()))
    assert abs(float(advantages.sum())) < 1e-6 * scale
    if float(rewards.std()) > 1e-3:
        torch.testing.assert_close(ADVANTAGES[name](rewards + 5), advantages, rtol=1e-6, atol=1e-6)


def test_leave_one_out_is_the_difference_to_the_others_mean():
    for i in range(5):
        others = [float(r) for j, r in enumerate(REWARDS) if j != i]
        assert float(rloo(REWARDS)[i]) == pytest.approx(float(REWARDS[i]) - sum(others) / 4)


def test_failed_members_enter_neither_baseline_nor_loss():
    group = group_advantages([1.0, None, 0.0, 0.5, None], dr_grpo)
    assert group.values == pytest.approx((0.5, 0.0, -0.5, 0.0, 0.0))
    assert group.has_loss == (True, False, True, True, False)
    assert group.verdict == "ok"


@pytest.mark.parametrize(
    ("rewards", "verdict"),
    [
        ([3.0], "too_few"),
        ([3.0, None, None], "too_few"),
        ([None, None], "too_few"),
        ([1.0, 1.0, None, 1.0], "zero_variance"),
        ([0.1 + 0.2, 0.1 + 0.2], "zero_variance"),
    ],
)
def test_a_group_that_says_nothing_has_no_advantage_and_no_loss(rewards, verdict: str):
    for name in ADVANTAGES:
        group = group_advantages(rewards, ADVANTAGES[name])
        assert group.verdict == verdict
        assert set(group.values) == {0.0}
        assert not any(group.has_loss)


def test_a_reward_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="finite"):
        group_advantages([1.0, math.nan], dr_grpo)


def test_every_configurable_advantage_has_a_function():
    names = get_args(AlgoSection.model_fields["advantage"].annotation)
    assert set(names) == {*ADVANTAGES, "batch_std"}  # which needs the other groups as well


def test_statuses_decide_who_enters_the_baseline():
    members = [
        GroupMember("done", 1.0, (3, 3)),
        GroupMember("truncated", 0.0, (2, 4)),
        GroupMember("truncated", None, (0, 0)),  # cut before anything scored it
        GroupMember("aborted", 5.0, (0, 9)),  # whatever it was given
        GroupMember("resumed", 0.5, (3, 5)),
        GroupMember("resumed", None, (1, 1)),  # still running
    ]
    group = member_advantages(members, dr_grpo)
    assert group.values == pytest.approx((0.5, -0.5, 0, 0, 0, 0))
    assert group.has_loss == (True, True, False, False, True, False)
    assert group.version_span == 5 - 2
    assert member_advantages([GroupMember("done", 1.0)] * 2, rloo).version_span is None


def test_a_group_left_with_one_member_trains_nothing_and_still_reports_its_span():
    group = member_advantages([GroupMember("done", 1.0, (3, 4)), GroupMember("aborted")], grpo)
    assert (group.verdict, group.values, group.has_loss) == ("too_few", (0, 0), (False, False))
    assert group.version_span == 1


def test_a_member_that_is_done_without_a_reward_is_refused():
    with pytest.raises(ValueError, match="needs a reward"):
        member_advantages([GroupMember("done"), GroupMember("done", 1.0)], dr_grpo)


def test_the_deviation_of_the_batch_by_hand():
    groups = [[1.0, 0.0, None], [2.0, 2.0], [7.0, None]]
    # rewards with a baseline: 1, 0, 2, 2; mean 1.25, squares 0.0625 + 1.5625 + 2·0.5625 = 2.75
    std = math.sqrt(2.75 / 3)
    mixed, equal, alone = batch_std(groups, eps=0.0)
    assert mixed.values == pytest.approx((0.5 / std, -0.5 / std, 0))
    assert mixed.has_loss == (True, True, False)
    assert (equal.verdict, set(equal.values)) == ("zero_variance", {0.0})
    assert (alone.verdict, set(alone.values)) == ("too_few", {0.0})
    assert batch_std([[7.0]])[0].verdict == "too_few"
    assert batch_std([]) == []


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=9))
def test_one_group_as_a_batch_is_grpo(values: list[float]):
    (batch,) = batch_std([values])
    assert batch.values == pytest.approx(group_advantages(values, grpo).values, rel=1e-9, abs=1e-9)
