import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shared.algo.corrections import tis_token
from shared.algo.four_policy import four_policy, split_four, three_policy
from shared.algo.losses import decoupled_ppo
from shared.algo.ratios import split

NAMES = ("now", "prox", "old", "inf")
four = st.tuples(*[st.floats(-3, -0.2)] * 4, st.floats(-2, 2))


def tensors(values: list[tuple[float, ...]]) -> tuple[torch.Tensor, ...]:
    columns = torch.tensor(values, dtype=torch.float64).T
    return tuple(column.clone() for column in columns)


def everywhere(column: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(column, dtype=torch.bool)


def plain(
    now: float, prox: float, old: float, inf: float, adv: float, cap: float, u_cap: float
) -> float:
    """w = min(D, cap), u = min(S1, u_cap), clip 0.2/0.28, dual 3."""
    d, s1, s2 = math.exp(old - inf), math.exp(prox - old), math.exp(now - prox)
    loss = -min(s2 * adv, min(1.28, max(0.8, s2)) * adv)
    if adv < 0:
        loss = min(loss, -3 * adv)
    return min(d, cap) * min(s1, u_cap) * loss


@given(st.lists(four, min_size=1, max_size=6))
def test_the_general_loss_and_its_gradient_are_those_of_the_formula(values):
    now, prox, old, inf, adv = tensors(values)
    now.requires_grad_()
    ratios = split_four(now, prox, old, inf, everywhere(old))
    w_T, u_T = tis_token(ratios.log_d_T, high=2.0), ratios.log_s1_T.exp().clamp(max=1.5)
    terms = four_policy(ratios, adv, w_T=w_T, u_T=u_T, dual=3.0)
    terms.loss_T.sum().backward()
    assert now.grad is not None
    h = 1e-6
    for t, (lp, p, o, i, a) in enumerate(values):
        want = plain(lp, p, o, i, a, 2.0, 1.5)
        assert terms.loss_T[t].item() == pytest.approx(want, rel=1e-12, abs=1e-12)
        up, down = (plain(lp + step, p, o, i, a, 2.0, 1.5) for step in (h, -h))
        if math.isclose(up - want, want - down, rel_tol=1e-3, abs_tol=1e-9):  # not at a kink
            assert float(now.grad[t]) == pytest.approx((up - down) / (2 * h), rel=1e-4, abs=1e-6)


@given(st.lists(four, min_size=1, max_size=6))
def test_the_three_ratios_multiply_to_the_total(values):
    now, prox, old, inf, _ = tensors(values)
    ratios = split_four(now, prox, old, inf, everywhere(old))
    torch.testing.assert_close(ratios.log_rho_T, now - inf)


@given(st.lists(four, min_size=1, max_size=6))
def test_with_the_anchor_at_the_behaviour_version_it_is_the_decoupled_loss(values):
    now, _, old, inf, adv = tensors(values)
    mask = everywhere(old)
    two = split(now, old, inf, mask)
    ratios = split_four(now, old, old, inf, mask)
    w_T = tis_token(two.log_d_T)
    want = decoupled_ppo(two.log_s_T, w_T, adv)
    torch.testing.assert_close(four_policy(ratios, adv, w_T=w_T, dual=3.0).loss_T, want)


@given(st.lists(four, min_size=1, max_size=6))
def test_without_old_logits_discrepancy_and_staleness_merge_in_one_weight(values):
    # Hilton et al. as openai/ppo-ewma computes it: everything in log space, ρ capped
    now, prox, old, inf, adv = tensors(values)
    mask = everywhere(old)
    behaviour = torch.maximum(inf, now - math.log(1.7))
    log_s = (now - prox).clamp(math.log(0.8), math.log(1.28))
    want = torch.maximum(
        -adv * torch.exp(now - behaviour), -adv * torch.exp(log_s + prox - behaviour)
    )
    got = three_policy(now, prox, inf, mask, adv, max_ratio=1.7)
    torch.testing.assert_close(got.loss_T, want)
    assert torch.equal(got.truncated["ratio_high"], now - inf > math.log(1.7))
    # whatever stands for π_old, only the product D·S1 = W enters
    for stand_in in (old, prox, inf):
        general = four_policy(split_four(now, prox, stand_in, inf, mask), adv, max_ratio=1.7)
        torch.testing.assert_close(general.loss_T, want)


@given(st.lists(four, min_size=1, max_size=6))
def test_anchored_on_the_sampler_it_is_the_bypass(values):
    now, _, _, inf, adv = tensors(values)
    terms = four_policy(split_four(now, inf, inf, inf, everywhere(inf)), adv)
    rho = (now - inf).exp()
    want = -torch.minimum(rho * adv, rho.clamp(0.8, 1.28) * adv)
    torch.testing.assert_close(terms.loss_T, want)


@given(st.lists(four, min_size=1, max_size=6))
def test_recomputed_from_the_current_weights_the_clip_never_acts(values):
    now, _, _, inf, adv = tensors(values)
    now.requires_grad_()
    start = now.detach()
    terms = four_policy(split_four(now, start, start, inf, everywhere(inf)), adv)
    assert not any(bool(hit.any()) for hit in terms.cut.values())
    terms.loss_T.sum().backward()
    assert now.grad is not None
    torch.testing.assert_close(now.grad, -(start - inf).exp() * adv)


@given(st.lists(four, min_size=1, max_size=6))
def test_unclipped_and_untruncated_the_gradient_is_minus_rho_a_for_every_pair_of_anchors(values):
    now, prox, old, inf, adv = tensors(values)
    for anchor, behaviour in ((prox, old), (inf, inf), (old, prox), (now, old)):
        leaf = now.clone().requires_grad_()
        ratios = split_four(leaf, anchor, behaviour, inf, everywhere(old))
        terms = four_policy(ratios, adv, clip_low=1.0, clip_high=1e9)
        terms.loss_T.sum().backward()
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad, -(now - inf).exp() * adv)


def test_with_four_equal_policies_the_loss_is_minus_a():
    same = torch.tensor([-1.0, -2.0], dtype=torch.float64)
    adv = torch.tensor([2.0, -3.0], dtype=torch.float64)
    terms = four_policy(split_four(same, same, same, same, everywhere(same)), adv, dual=3.0)
    assert terms.loss_T.tolist() == [-2.0, 3.0]


def test_only_the_current_policy_is_differentiated():
    now, prox, old, inf = (torch.tensor([x], requires_grad=True) for x in (-1.0, -1.1, -1.2, -1.3))
    four_policy(split_four(now, prox, old, inf, everywhere(now)), torch.ones(1)).loss_T.backward()
    assert now.grad is not None
    assert [x.grad for x in (prox, old, inf)] == [None, None, None]


def test_tokens_without_a_finite_log_prob_are_neutral_and_named():
    nan, mask = float("nan"), torch.tensor([True, True, False])
    now = torch.tensor([-1.0, -1.0, -1.0], requires_grad=True)
    ratios = split_four(now, now - 1, torch.tensor([-1.0, nan, -9.0]), now - 2, mask)
    assert ratios.finite_T.tolist() == [True, False, True]
    assert ratios.log_d_T.tolist() == [2.0, 0.0, 0.0]
    loss = four_policy(ratios, torch.ones(3)).loss_T.sum()
    loss.backward()
    assert now.grad is not None
    assert torch.isfinite(now.grad).all()
