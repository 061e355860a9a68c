import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from shared.algo.losses import decoupled_ppo
from shared.algo.ratios import SAFETY_BOUND, log_ratio, ratio, split

LOGPROB = st.floats(-8, 0)


def test_the_two_ratios_by_hand_and_zero_outside_the_mask():
    ratios = split(
        l_T=torch.tensor([math.log(0.6), -1.0, 0.0]),
        l_old_T=torch.tensor([math.log(0.4), -5.0, math.nan]),
        l_inf_T=torch.tensor([math.log(0.5), -9.0, 0.0]),
        m_T=torch.tensor([1, 0, 0]),
    )
    assert torch.allclose(ratio(ratios.log_d_T), torch.tensor([0.8, 1.0, 1.0]))
    assert torch.allclose(ratio(ratios.log_s_T), torch.tensor([1.5, 1.0, 1.0]))


@given(LOGPROB, LOGPROB, LOGPROB)
def test_discrepancy_times_staleness_is_the_total(l_new: float, l_old: float, l_inf: float):
    tensors = [torch.tensor([x], dtype=torch.float64) for x in (l_new, l_old, l_inf)]
    ratios = split(*tensors, torch.ones(1))
    total = math.exp(l_new - l_inf)
    assert math.isclose(float(ratio(ratios.log_d_T) * ratio(ratios.log_s_T)), total, rel_tol=1e-12)


def test_operands_are_widened_before_they_are_subtracted():
    a = torch.tensor([-5.0], dtype=torch.bfloat16)
    b = torch.tensor([-4.96875], dtype=torch.bfloat16)
    assert log_ratio(a, b).dtype == torch.float32
    assert log_ratio(a, b).item() == -0.03125
    assert log_ratio(a.double(), b.double()).dtype == torch.float64
    small = torch.tensor([-0.0625], dtype=torch.bfloat16)
    assert log_ratio(a, small).item() == -4.9375
    assert log_ratio(a, small / 8).item() == -4.9921875  # -5 when subtracted in bfloat16


def test_only_the_current_policy_is_differentiated():
    now, old, inf = (torch.tensor([-1.0, x], requires_grad=True) for x in (-2.0, -1.5, -1.2))
    ratios = split(now, old, inf, torch.ones(2))
    (ratios.log_d_T + ratios.log_s_T).sum().backward()
    assert now.grad is not None
    assert now.grad.tolist() == [1.0, 1.0]
    assert old.grad is None
    assert inf.grad is None


def test_an_extreme_ratio_is_bounded_and_stays_finite():
    extreme = ratio(torch.tensor([1e4, -1e4]))
    assert torch.allclose(extreme.log(), torch.tensor([SAFETY_BOUND, -SAFETY_BOUND]))


def test_a_token_without_a_finite_ratio_is_marked():
    ratios = split(
        torch.tensor([-1.0, -1.0]), torch.tensor([-1.0, -torch.inf]),
        torch.tensor([torch.nan, -1.0]), torch.ones(2),
    )  # fmt: skip
    assert ratios.finite_T.tolist() == [False, False]
    assert ratios.log_s_T.tolist() == [0.0, 0.0]


def test_same_version_and_same_engine_give_exactly_one():
    logprobs = torch.randn(50)
    ratios = split(logprobs, logprobs, logprobs, torch.ones(50))
    assert torch.equal(ratio(ratios.log_d_T), torch.ones(50))
    assert torch.equal(ratio(ratios.log_s_T), torch.ones(50))


@given(st.lists(st.tuples(LOGPROB, LOGPROB, LOGPROB, st.floats(-2, 2)), min_size=1, max_size=6))
def test_without_masks_and_clips_the_gradient_does_not_depend_on_the_old_logprob(rows):
    current, inf, substitute, adv = (
        torch.tensor(c, dtype=torch.float64) for c in zip(*rows, strict=True)
    )
    current.requires_grad_()
    ratios = split(current, substitute, inf, torch.ones(len(rows)))
    loss = decoupled_ppo(
        ratios.log_s_T, ratio(ratios.log_d_T), adv, clip_low=1.0, clip_high=1e12, dual=None
    )
    (grad,) = torch.autograd.grad(loss.sum(), current)
    total = torch.exp(current.detach() - inf)
    torch.testing.assert_close(grad, -total * adv, rtol=1e-9, atol=1e-12)
