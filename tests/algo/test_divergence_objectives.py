import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shared.algo.divergence_objectives import (
    binary_kl,
    binary_tv,
    dppo_kl,
    dppo_tv,
    ipo,
    prime_rl_default,
)


def logs(*probabilities: float) -> torch.Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log()


def advantages(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


P = logs(0.5, 0.5, 0.5, 0.5, 0.001)
Q = logs(0.8, 0.8, 0.2, 0.2, 0.1)
A = advantages(1.0, -1.0, 1.0, -1.0, 1.0)


def where(flags: torch.Tensor) -> list[int]:
    return flags.nonzero()[:, 0].tolist()


def test_divergences_by_hand():
    assert binary_tv(Q, P).tolist() == pytest.approx([0.3, 0.3, -0.3, -0.3, 0.099])
    want = 0.5 * math.log(0.5 / 0.8) + 0.5 * math.log(0.5 / 0.2)
    assert binary_kl(Q, P)[:3].tolist() == pytest.approx([want] * 3, rel=1e-6)
    certain = torch.zeros(1, dtype=torch.float64)
    assert binary_kl(certain, certain).item() == 0.0


def test_dppo_tv_cuts_outward_moves_only():
    terms = dppo_tv(Q, P, A)
    assert where(terms.cut["dppo_high"]) == [0]
    assert where(terms.cut["dppo_low"]) == [3]
    # -r·A·ℓ; the last ratio of 100 is truncated, and its probability hardly moved
    want = [0, 1.6 * math.log(0.8), -0.4 * math.log(0.2), 0, -20 * math.log(0.1)]
    assert terms.loss_T.tolist() == pytest.approx(want)
    assert where(terms.truncated["ratio_high"]) == [4]


def test_dppo_kl_cuts_outward_moves_only():
    terms = dppo_kl(Q, P, A, low=0.2, high=0.2)  # 0.223 for the first four
    assert where(terms.cut["dppo_high"]) == [0]  # the last has 0.1
    assert where(terms.cut["dppo_low"]) == [3]
    assert where(dppo_kl(Q, P, A, low=0.23, high=0.23).cut["dppo_low"]) == []


def test_prime_rl_by_hand_penalises_every_token_also_where_it_cuts():
    terms = prime_rl_default(Q, P, A, kappa=0.5)
    squares = [math.log(1.6) ** 2] * 2 + [math.log(0.4) ** 2] * 2 + [math.log(100) ** 2]
    policy = [0, 1.6, -0.4, 0, -100]
    assert terms.loss_T.tolist() == pytest.approx(
        [p + 0.5 * square for p, square in zip(policy, squares, strict=True)]
    )
    assert where(terms.cut["dppo_high"]) == [0]
    assert where(terms.cut["dppo_low"]) == [3]


def test_ipo_cuts_whatever_the_advantage():
    terms = ipo(Q, P, A, kappa=0.0)
    assert where(terms.cut["dppo_high"]) == [0, 1]
    assert where(terms.cut["dppo_low"]) == [2, 3]
    assert terms.loss_T.tolist() == pytest.approx([0, 0, 0, 0, -100])


def test_a_token_without_advantage_counts_as_falling():
    # prime-rl and verl choose the mask by A > 0, so A = 0 takes the lower one
    terms = dppo_tv(logs(0.2), logs(0.5), advantages(0.0))
    assert where(terms.cut["dppo_low"]) == [0]


probabilities = st.floats(0.01, 0.99)


@given(probabilities, probabilities, st.sampled_from([-1.0, 2.0]))
def test_gradients_are_those_of_the_formulas(p: float, q: float, adv: float):
    anchor, adv_1 = logs(p), advantages(adv)
    change, r = q - p, q / p
    cut = change > 0.2 if adv > 0 else change < -0.2
    lp = logs(q).requires_grad_()
    dppo_tv(lp, anchor, adv_1).loss_T.sum().backward()
    assert lp.grad is not None
    assert float(lp.grad) == pytest.approx(0.0 if cut else -min(r, 20.0) * adv)
    lp = logs(q).requires_grad_()
    prime_rl_default(lp, anchor, adv_1).loss_T.sum().backward()
    assert lp.grad is not None
    want = (0.0 if cut else -r * adv) + 2e-3 * math.log(r)
    assert float(lp.grad) == pytest.approx(want, abs=1e-9)


@given(probabilities, probabilities)
def test_the_binary_kl_is_zero_only_at_equality_and_pinsker_bounds_it(p: float, q: float):
    kl, change = float(binary_kl(logs(q), logs(p))), q - p
    assert kl >= 2 * change**2 - 1e-7
    assert kl >= -1e-12


def test_on_policy_nothing_is_cut_and_the_penalty_vanishes():
    for terms in (dppo_tv(P, P, A), dppo_kl(P, P, A), prime_rl_default(P, P, A), ipo(P, P, A)):
        assert not any(bool(hit.any()) for hit in terms.cut.values())
    assert prime_rl_default(P, P, A).loss_T.tolist() == pytest.approx((-A).tolist())
