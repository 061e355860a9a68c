import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shared.algo.corrections import Layout
from shared.algo.losses import (
    AGGREGATIONS,
    Denominators,
    aggregate,
    clip_causes,
    decoupled_ppo,
)
from shared.algo.objective import AGGREGATION_MODES

# (S, W, A) -> L with clip 0.2/0.28 and dual 3
TABLE = [
    (1.0, 1.0, 2.0, -2.0),
    (1.1, 0.5, 2.0, -1.1),
    (1.5, 1.0, 2.0, -2.56),  # clipped high
    (0.5, 1.0, 2.0, -1.0),  # a positive advantage is not clipped from below
    (0.5, 1.0, -2.0, 1.6),  # clipped low
    (1.5, 2.0, -2.0, 6.0),  # a negative advantage is not clipped from above
    (5.0, 2.0, -1.0, 6.0),  # dual clip: 3, times W
    (5.0, 1.0, 0.0, 0.0),
]


def column(index: int) -> torch.Tensor:
    return torch.tensor([row[index] for row in TABLE], dtype=torch.float64)


def test_the_loss_by_hand():
    loss = decoupled_ppo(column(0).log(), column(1), column(2))
    assert loss.tolist() == pytest.approx(column(3).tolist())


def test_causes_by_hand():
    causes = clip_causes(column(0).log(), column(2), clip_low=0.2, clip_high=0.28, dual=3.0)
    assert [i for i, hit in enumerate(causes["clip_high"]) if hit] == [2]
    assert [i for i, hit in enumerate(causes["clip_low"]) if hit] == [4]
    assert [i for i, hit in enumerate(causes["dual"]) if hit] == [6]
    assert "dual" not in clip_causes(
        column(0).log(), column(2), clip_low=0.2, clip_high=0.28, dual=None
    )


def test_its_gradient_is_that_of_finite_differences_away_from_the_kinks():
    log_s = column(0).log().requires_grad_()
    weight, adv = column(1), column(2)
    assert torch.autograd.gradcheck(lambda x: decoupled_ppo(x, weight, adv), log_s)


@given(st.floats(-3, 3), st.floats(0, 5), st.floats(-3, 3))
def test_the_gradient_is_minus_w_a_s_where_not_cut_and_zero_where_cut(
    value: float, weight: float, adv: float
):
    log_s = torch.tensor([value], dtype=torch.float64, requires_grad=True)
    advantage = torch.tensor([adv], dtype=torch.float64)
    loss = decoupled_ppo(log_s, torch.tensor([weight], dtype=torch.float64), advantage)
    loss.sum().backward()
    causes = clip_causes(log_s, advantage, clip_low=0.2, clip_high=0.28, dual=3.0)
    cut = any(bool(where) for where in causes.values())
    assert log_s.grad is not None
    want = 0.0 if cut else -weight * adv * math.exp(value)
    assert float(log_s.grad) == pytest.approx(want, rel=1e-9, abs=1e-12)


def test_a_wide_clip_and_no_dual_is_plain_importance_sampling():
    log_s = torch.linspace(-2, 2, 9, dtype=torch.float64)
    adv = torch.linspace(-1, 1, 9, dtype=torch.float64)
    loss = decoupled_ppo(
        log_s, torch.ones(9, dtype=torch.float64), adv, clip_low=1.0, clip_high=1e9, dual=None
    )
    torch.testing.assert_close(loss, -log_s.exp() * adv)


# three sequences: loss tokens 2, 1, 0; token 1 rejected
LOSS = torch.tensor([1.0, 100.0, 7.0, 4.0, 9.0], dtype=torch.float64)
LAYOUT = Layout(torch.tensor([True, True, False, True, False]), torch.tensor([0, 0, 0, 1, 2]), 3)
KEEP = torch.tensor([True, False, False, True, False])
BEFORE = Denominators(num_tokens=3.0, num_sequences=2.0, horizon=10.0)


@pytest.mark.parametrize(
    ("mode", "before", "after"),
    [
        ("token_mean", 5 / 3, 5 / 2),
        ("seq_mean_token_sum", 5 / 2, 5 / 2),
        ("seq_mean_token_mean", (1 / 2 + 4) / 2, (1 + 4) / 2),
        ("token_sum_constant", 5 / 10, 5 / 10),
        ("seq_mean_constant", 5 / 20, 5 / 20),
    ],
)
def test_aggregation_by_hand_with_denominators_before_and_after_rejection(
    mode: str, before: float, after: float
):
    assert float(aggregate(LOSS, KEEP, LAYOUT, BEFORE, mode=mode)) == pytest.approx(before)
    kept = Layout(KEEP, LAYOUT.seq_T, 3)
    counts = Denominators(2.0, 2.0, 10.0)
    assert float(aggregate(LOSS, KEEP, kept, counts, mode=mode)) == pytest.approx(after)


def test_what_is_not_kept_is_inert_even_when_not_finite():
    # alibaba/ROLL's token-mean ignored its mask: [1, 100] masked [1, 0] gave 101
    loss = torch.tensor([1.0, torch.nan], dtype=torch.float64, requires_grad=True)
    keep = torch.tensor([True, False])
    two = Layout(torch.ones(2, dtype=torch.bool), torch.zeros(2, dtype=torch.int64), 1)
    value = aggregate(loss, keep, two, Denominators(2.0, 1.0))
    value.backward()
    assert value.item() == 0.5
    assert loss.grad is not None
    assert loss.grad.tolist() == [0.5, 0.0]


@given(st.sampled_from(AGGREGATION_MODES), st.integers(1, 3))
def test_micro_batches_add_up_to_the_whole(mode: str, cut: int):
    by = Denominators(3.0, 2.0, 10.0)
    at = [0, 3, 4, 5][cut]
    whole = aggregate(LOSS, KEEP, LAYOUT, by, mode=mode)
    parts = [
        aggregate(LOSS[s], KEEP[s], Layout(LAYOUT.m_T[s], LAYOUT.seq_T[s], 3), by, mode=mode)
        for s in (slice(0, at), slice(at, 5))
    ]
    assert float(sum(parts)) == pytest.approx(float(whole))


@pytest.mark.parametrize("mode", AGGREGATION_MODES)
def test_a_denominator_of_zero_is_refused(mode: str):
    with pytest.raises(ValueError, match="must be positive"):
        aggregate(LOSS, KEEP, LAYOUT, Denominators(0.0, 0.0, 0.0), mode=mode)


def test_every_configurable_mode_has_a_function():
    assert tuple(AGGREGATIONS) == AGGREGATION_MODES
