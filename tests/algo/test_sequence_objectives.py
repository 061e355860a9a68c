import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shared.algo.layout import Layout
from shared.algo.losses import Denominators, aggregate
from shared.algo.sequence_objectives import (
    gspo,
    gspo_token,
    opsm_keep,
    sequence_log_ratio,
    vcpo_baseline,
    vcpo_lr_scale,
    vespo,
    vespo_weight,
)

# two sequences, three and two tokens; the second token is the environment's
MASK = torch.tensor([True, False, True, True, True])
LAYOUT = Layout(MASK, torch.tensor([0, 0, 0, 1, 1]), 2)
LOG_S = torch.tensor([0.3, 9.0, -0.1, 0.2, 0.4], dtype=torch.float64)  # means 0.1, 0.3
ADV = torch.tensor([1.0, 7.0, 1.0, -2.0, -2.0], dtype=torch.float64)


def test_gspo_by_hand_and_environment_tokens_do_not_count():
    terms = gspo(LOG_S, ADV, LAYOUT, clip_low=0.2, clip_high=0.2)
    first, second = -math.exp(0.1), 2 * math.exp(0.3)
    assert terms.loss_T[MASK].tolist() == pytest.approx([first] * 2 + [second] * 2)
    tight = gspo(LOG_S, ADV, LAYOUT, clip_low=0.05, clip_high=0.05)
    assert tight.loss_T[MASK].tolist() == pytest.approx([-1.05] * 2 + [second] * 2)
    assert tight.cut["clip_high"][MASK].tolist() == [True, True, False, False]
    assert not tight.cut["clip_low"].any()


def test_gspo_averages_the_advantages_of_a_sequence():
    uneven = torch.tensor([1.0, 99.0, 3.0, 0.0, 0.0], dtype=torch.float64)
    terms = gspo(LOG_S, uneven, LAYOUT, clip_low=0.5, clip_high=0.5)
    assert terms.loss_T[0].item() == pytest.approx(-2 * math.exp(0.1))


def gradient(function, log_s: torch.Tensor, adv: torch.Tensor, **bounds: float) -> list[float]:
    leaf = log_s.clone().requires_grad_()
    terms = function(leaf, adv, LAYOUT, **bounds)
    by = Denominators(4.0, 2.0)
    aggregate(terms.loss_T, MASK, LAYOUT, by, mode="seq_mean_token_mean").backward()
    assert leaf.grad is not None
    return leaf.grad.tolist()


def test_each_token_of_gspo_has_gradient_minus_a_s_over_n():
    want = [-math.exp(0.1) / 2, 0, -math.exp(0.1) / 2, math.exp(0.3), math.exp(0.3)]
    want = [x / 2 for x in want]  # mean over two sequences
    assert gradient(gspo, LOG_S, ADV, clip_low=0.5, clip_high=0.5) == pytest.approx(want)


@given(st.lists(st.floats(-0.5, 0.5), min_size=5, max_size=5), st.floats(-2, 2), st.floats(-2, 2))
def test_both_forms_of_gspo_have_the_same_gradient(
    values: list[float], first: float, second: float
):
    log_s = torch.tensor(values, dtype=torch.float64)
    adv = torch.tensor([first] * 3 + [second] * 2, dtype=torch.float64)
    bounds = {"clip_low": 0.1, "clip_high": 0.1}
    assert gradient(gspo_token, log_s, adv, **bounds) == pytest.approx(
        gradient(gspo, log_s, adv, **bounds), rel=1e-9, abs=1e-12
    )


def test_gspo_token_uses_each_tokens_own_advantage():
    uneven = torch.tensor([1.0, 0.0, 3.0, 0.0, 0.0], dtype=torch.float64)
    terms = gspo_token(LOG_S, uneven, LAYOUT, clip_low=0.5, clip_high=0.5)
    assert terms.loss_T[MASK].tolist() == pytest.approx([-math.exp(0.1), -3 * math.exp(0.1), 0, 0])


def test_vespo_by_hand():
    lp = torch.full_like(LOG_S, -1.0)
    up, down = math.exp(0.2), math.exp(0.6)  # products of the two sequences
    want_up = math.exp(3) * up**2 * math.exp(-3 * up)
    want_down = math.exp(2) * down**3 * math.exp(-2 * down)
    assert vespo_weight(LOG_S, ADV, LAYOUT)[MASK].tolist() == pytest.approx(
        [want_up] * 2 + [want_down] * 2
    )
    loss = vespo(lp, LOG_S, ADV, LAYOUT).loss_T[MASK].tolist()
    assert loss == pytest.approx([want_up] * 2 + [-2 * want_down] * 2)


@given(st.floats(-60, 60), st.sampled_from([-1.0, 1.0]))
def test_the_vespo_weight_is_finite_and_highest_at_k_over_lambda(log_w: float, adv: float):
    one = Layout(torch.ones(1, dtype=torch.bool), torch.zeros(1, dtype=torch.int64), 1)
    adv_1 = torch.tensor([adv], dtype=torch.float64)

    def phi(value: float) -> float:
        return float(vespo_weight(torch.tensor([value], dtype=torch.float64), adv_1, one))

    top = math.log(2 / 3 if adv > 0 else 3 / 2)
    assert 0 <= phi(log_w) <= phi(top) * (1 + 1e-12)
    assert phi(0.0) == pytest.approx(1.0)


def test_opsm_drops_negative_sequences_that_the_policy_has_left():
    # means of -log r: -0.1 and -0.3; turned round, 0.1 and 0.3
    assert opsm_keep(LOG_S, ADV, LAYOUT, delta=0.2).all()
    away = opsm_keep(-LOG_S, ADV, LAYOUT, delta=0.2)
    assert away[MASK].tolist() == [True, True, False, False]
    assert opsm_keep(-LOG_S, -ADV, LAYOUT, delta=0.2).all()  # 0.1 is not above
    assert opsm_keep(-LOG_S, -ADV, LAYOUT, delta=0.05)[MASK].tolist() == [False] * 2 + [True] * 2


def test_opsm_keeps_a_sequence_at_its_bound_and_vespo_counts_no_advantage_as_positive():
    same = torch.zeros_like(LOG_S)
    assert opsm_keep(same, torch.full_like(ADV, -1.0), LAYOUT, delta=0.0).all()
    none = vespo_weight(LOG_S, torch.zeros_like(ADV), LAYOUT)
    assert torch.equal(none, vespo_weight(LOG_S, torch.ones_like(ADV), LAYOUT))


def test_sequence_products_ignore_environment_tokens():
    assert sequence_log_ratio(LOG_S, LAYOUT).tolist() == pytest.approx([0.2] * 3 + [0.6] * 2)


def test_the_learning_rate_shrinks_with_the_effective_sample_size():
    w1, w2 = math.exp(0.2), math.exp(0.6)
    ess = (w1 + w2) ** 2 / (w1**2 + w2**2)
    assert float(vcpo_lr_scale(LOG_S, LAYOUT)) == pytest.approx(math.sqrt(ess / 2))
    assert float(vcpo_lr_scale(0 * LOG_S, LAYOUT)) == 1.0
    third = Layout(MASK, LAYOUT.seq_T, 3)  # a sequence without loss tokens does not count
    assert float(vcpo_lr_scale(0 * LOG_S, third)) == 1.0


def test_the_baseline_is_the_mean_reward_weighted_by_squared_weight_and_gradient():
    log_w = torch.tensor([0.0, math.log(2)], dtype=torch.float64)
    norms, rewards = torch.tensor([3.0, 1.0]).double(), torch.tensor([1.0, 0.0]).double()
    assert float(vcpo_baseline(log_w, norms, rewards)) == pytest.approx(3 / (3 + 4))
    assert float(vcpo_baseline(0 * log_w, 0 * norms + 1, rewards)) == pytest.approx(0.5)


def test_a_sequence_of_one_token_makes_gspo_plain_ppo():
    own = Layout(torch.ones(5, dtype=torch.bool), torch.arange(5), 5)
    terms = gspo(LOG_S, ADV, own, clip_low=0.2, clip_high=0.2)
    s = LOG_S.exp()
    want = -torch.minimum(s * ADV, s.clamp(0.8, 1.2) * ADV)
    torch.testing.assert_close(terms.loss_T, want)
