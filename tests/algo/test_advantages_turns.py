import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shared.algo.advantages import ADVANTAGES, dr_grpo, group_advantages, grpo
from shared.algo.layout import Layout
from shared.algo.turn_credit import per_token, reward_to_go, turn_advantages


def test_reward_to_go_by_hand():
    assert reward_to_go([1.0, 0.0, 4.0], gamma=0.5) == (1 + 0.5 * 2, 2, 4)
    assert reward_to_go([1.0, 0.0, 4.0]) == (5, 4, 4)
    assert reward_to_go([1.0, 0.0, 4.0], gamma=0.0) == (1, 0, 4)
    assert reward_to_go([]) == ()
    with pytest.raises(ValueError, match="gamma"):
        reward_to_go([1.0], gamma=1.5)


@given(st.lists(st.floats(-5, 5), max_size=8), st.floats(0, 1))
def test_reward_to_go_is_the_discounted_sum_of_what_follows(rewards: list[float], gamma: float):
    want = [
        sum(gamma ** (j - k) * rewards[j] for j in range(k, len(rewards)))
        for k in range(len(rewards))
    ]
    assert reward_to_go(rewards, gamma=gamma) == pytest.approx(want, abs=1e-9)


def test_turns_are_compared_at_the_same_step_of_the_group():
    rewards = [[0.0, 1.0, 1.0], [0.0, 0.0], None, [2.0, 0.0]]
    # returns 2 2 1 | 0 0 | - | 2 0, so by step: (2, 0, 2), (2, 0, 0), (1)
    turn = turn_advantages(rewards, estimator=dr_grpo)
    assert turn.values[0] == pytest.approx((2 / 3, 4 / 3, 0))
    assert turn.values[1] == pytest.approx((-4 / 3, -2 / 3))
    assert turn.values[2] == ()
    assert turn.values[3] == pytest.approx((2 / 3, -2 / 3))
    assert turn.has_loss == ((True, True, False), (True, True), (), (True, True))


def test_without_an_estimator_the_advantage_is_the_return():
    turn = turn_advantages([[0.0, 1.0], None, [3.0]], gamma=0.5)
    assert turn.values == ((0.5, 1.0), (), (3.0,))
    assert turn.has_loss == ((True, True), (), (True,))
    assert turn_advantages([None], estimator=grpo).values == ((),)


def test_a_step_at_which_all_returns_agree_has_no_loss():
    turn = turn_advantages([[0.0, 1.0], [1.0, 1.0]], gamma=0.0, estimator=grpo)
    assert turn.has_loss == ((True, False), (True, False))
    assert turn.values[0][1] == 0.0


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=6), st.sampled_from(sorted(ADVANTAGES)))
def test_one_turn_each_is_the_trajectory_level_advantage(rewards: list[float], name: str):
    turn = turn_advantages([[r] for r in rewards], gamma=0.3, estimator=ADVANTAGES[name])
    group = group_advantages(rewards, ADVANTAGES[name])
    assert tuple(v for (v,) in turn.values) == group.values
    assert tuple(h for (h,) in turn.has_loss) == group.has_loss


@pytest.mark.parametrize("estimator", [None, dr_grpo])
def test_a_reward_that_is_not_finite_is_refused(estimator):
    with pytest.raises(ValueError, match="finite"):
        turn_advantages([[0.0, float("nan")], [1.0, 2.0]], estimator=estimator)


def test_an_advantage_is_constant_inside_a_turn():
    mask = torch.tensor([0, 1, 1, 0, 1, 0, 1, 1]).bool()
    layout = Layout(mask, torch.tensor([0] * 5 + [1] * 3), 2)
    values = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    assert per_token(values, layout).tolist() == [0, 0.5, 0.5, 0, -1, 0, 2, 2]
    with pytest.raises(ValueError, match="3 runs"):
        per_token(values[:2], layout)
