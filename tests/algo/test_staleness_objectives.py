import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shared.algo.losses import decoupled_ppo
from shared.algo.staleness_objectives import (
    cispo,
    double_sided,
    m2po,
    m2po_keep,
    ppo,
    reinforce,
    sapo,
    topr,
)

S = torch.tensor([0.5, 0.9, 1.0, 1.5, 6.0], dtype=torch.float64)
UP, DOWN = torch.full_like(S, 2.0), torch.full_like(S, -2.0)
LP = torch.full_like(S, -0.5)  # -A·ℓ is 1 for A = 2, -1 for A = -2
MASK = torch.ones(5, dtype=torch.bool)


def where(flags: torch.Tensor) -> list[int]:
    return flags.nonzero()[:, 0].tolist()


def test_ppo_is_the_decoupled_loss_without_weight_and_names_its_cuts():
    terms = ppo(S.log(), DOWN, clip_low=0.2, clip_high=0.28, dual=3.0)
    assert terms.loss_T.tolist() == pytest.approx([1.6, 1.8, 2.0, 3.0, 6.0])
    assert {cause: where(hit) for cause, hit in terms.cut.items()} == {
        "clip_high": [],
        "clip_low": [0],
        "dual": [4],
    }
    torch.testing.assert_close(
        terms.loss_T, decoupled_ppo(S.log(), torch.ones_like(S), DOWN), rtol=0, atol=0
    )


@given(st.floats(-3, 3), st.sampled_from([-2.0, 1.0]), st.floats(1.3, 6))
def test_a_ratio_capped_before_the_min_is_the_dual_clip(log_s: float, adv: float, delta: float):
    # TRL's `delta`: -min(min(S, delta)·A, clip(S)·A)
    s = math.exp(log_s)
    clipped = min(1.28, max(0.8, s))
    want = -min(min(s, delta) * adv, clipped * adv)
    got = ppo(torch.tensor([log_s]).double(), torch.tensor([adv]).double(), dual=delta)
    assert got.loss_T.item() == pytest.approx(want)


def test_reinforce_by_hand():
    terms = reinforce(LP, S.log(), UP, cap=2.0)
    assert terms.loss_T.tolist() == pytest.approx([0.5, 0.9, 1.0, 1.5, 2.0])
    assert where(terms.truncated["ratio_high"]) == [4]


def test_cispo_by_hand_is_one_sided_by_default():
    terms = cispo(LP, S.log(), UP)
    assert terms.loss_T.tolist() == pytest.approx([0.5, 0.9, 1.0, 1.5, 5.0])
    both = cispo(LP, S.log(), UP, clip_low=0.2, clip_high=0.28)
    assert both.loss_T.tolist() == pytest.approx([0.8, 0.9, 1.0, 1.28, 1.28])
    assert where(both.truncated["ratio_low"]) == [0]
    assert where(both.truncated["ratio_high"]) == [3, 4]
    assert both.cut == {}


@given(st.floats(-3, 3), st.floats(-2, 2))
def test_no_token_is_without_gradient_under_cispo(log_s: float, adv: float):
    lp = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
    cispo(lp, torch.tensor([log_s]).double(), torch.tensor([adv]).double()).loss_T.sum().backward()
    assert lp.grad is not None
    assert float(lp.grad) == pytest.approx(-min(5.0, math.exp(log_s)) * adv)


def test_topr_keeps_positive_samples_whole_and_tapers_negative_ones():
    score = torch.tensor([1.0, 0.0, -1.0, -1.0, 1.0])
    terms = topr(LP, S.log(), UP, score)
    assert terms.loss_T.tolist() == pytest.approx([1.0, 0.9, 1.0, 1.0, 1.0])
    assert where(terms.truncated["ratio_high"]) == [3]


def test_sapo_by_hand():
    loss = sapo(S.log(), UP).loss_T.tolist()
    assert loss[2] == pytest.approx(-2 * 4 * 0.5)
    assert loss[4] == pytest.approx(-2 * 4 / (1 + math.exp(-5)))
    down = sapo(S.log(), DOWN).loss_T.tolist()
    assert down[0] == pytest.approx(2 * (4 / 1.05) / (1 + math.exp(1.05 * 0.5)))


def test_the_double_sided_mask_is_open():
    exact = torch.tensor([1 - 0.25, 1.0, 1 + 0.25], dtype=torch.float64)
    lp = torch.full_like(exact, -0.5)
    terms = double_sided(lp, exact.log(), torch.full_like(exact, 2.0), low=0.25, high=0.25)
    assert terms.loss_T.tolist() == pytest.approx([0, 1, 0])
    assert where(terms.cut["outside_low"]) == [0]
    assert where(terms.cut["outside_high"]) == [2]


def test_m2po_drops_the_largest_until_the_mean_is_below():
    log_r = torch.tensor([0.1, -0.6, 0.2, 0.3, 5.0], dtype=torch.float64)
    mask = torch.tensor([1, 1, 1, 1, 0]).bool()
    # squares 0.01 0.36 0.04 0.09; means of the 4, 3, 2, 1 smallest: 0.125 0.0467 0.025 0.01
    assert where(m2po_keep(log_r, mask, threshold=0.2)) == [0, 1, 2, 3]
    assert where(m2po_keep(log_r, mask, threshold=0.05)) == [0, 2, 3]
    assert where(m2po_keep(log_r, mask, threshold=0.04)) == [0, 2]
    assert where(m2po_keep(log_r, mask, threshold=0.025)) == [0]  # "below" is strict
    assert where(m2po_keep(log_r, mask, threshold=0.001)) == [0]  # one always stays
    assert where(m2po_keep(log_r, ~mask & False, threshold=0.1)) == []
    terms = m2po(log_r, UP, mask, threshold=0.04)
    assert terms.loss_T.tolist() == pytest.approx([-2 * math.exp(0.1), 0, -2 * math.exp(0.2), 0, 0])
    assert where(terms.cut["m2po"]) == [1, 3]


@given(st.lists(st.floats(-2, 2), min_size=1, max_size=30), st.floats(1e-3, 1))
def test_what_m2po_keeps_is_the_most_that_satisfies_its_threshold(
    values: list[float], threshold: float
):
    log_r = torch.tensor(values, dtype=torch.float64)
    keep = m2po_keep(log_r, torch.ones(len(values), dtype=torch.bool), threshold=threshold)
    squares = sorted(x * x for x in values)
    kept = int(keep.sum())
    assert sorted((log_r[keep] ** 2).tolist()) == pytest.approx(squares[:kept])
    assert kept == 1 or sum(squares[:kept]) / kept < threshold + 1e-12
    for more in range(kept + 1, len(squares) + 1):
        assert sum(squares[:more]) / more >= threshold - 1e-12


def test_at_a_ratio_of_one_the_surrogates_have_the_value_of_the_policy_gradient():
    one = torch.zeros(5, dtype=torch.float64)
    assert ppo(one, UP).loss_T.tolist() == [-2.0] * 5
    assert m2po(one, UP, MASK).loss_T.tolist() == [-2.0] * 5
    assert sapo(one, UP).loss_T.tolist() == [-4.0] * 5  # 4/τ·σ(0) = 2: a constant apart
