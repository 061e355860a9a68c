import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shared.algo.ewma import (
    behaviour_age,
    blend,
    measure_anchor,
    nearest_anchor,
    start_anchor,
    target_age,
)
from shared.algo.ewma_control import ASYNC, AnchorState, EwmaSettings, advance


def run(settings: EwmaSettings, targets: list[float], weights) -> tuple[torch.Tensor, AnchorState]:
    """Anchor after steps 1..n over weights(step), from a fresh copy of weights(0)."""
    anchor, state = start_anchor([("w", weights(0))]), AnchorState()
    for step, target in enumerate(targets, start=1):
        decision = advance(state, settings, target_age=target)
        blend(anchor, [("w", weights(step))], decision.keep)
        state = decision.state
    return anchor["w"], state


def random_weights(step: int) -> torch.Tensor:
    return torch.randn(5, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


@given(st.floats(0.0, 0.98), st.integers(0, 20))
def test_the_anchor_is_the_original_bias_corrected_average(beta: float, steps: int):
    # openai/ppo-ewma EwmaModel: W' = βW + 1, θ̄ = (βW·θ̄ + θ)/W'
    mean, total = random_weights(0), 1.0
    for step in range(1, steps + 1):
        new_total = beta * total + 1
        mean = (beta * total * mean + random_weights(step)) / new_total
        total = new_total
    anchor, _ = run(EwmaSettings(beta=beta), [0.0] * steps, random_weights)
    torch.testing.assert_close(anchor, mean, rtol=1e-13, atol=1e-14)
    weights = [beta**j for j in range(steps + 1)]
    plain = sum(w * random_weights(steps - j) for j, w in enumerate(weights)) / sum(weights)
    torch.testing.assert_close(anchor, plain, rtol=1e-11, atol=1e-12)


@given(st.lists(st.floats(0, 8), min_size=1, max_size=25))
def test_on_linear_weights_the_anchor_is_the_snapshot_of_its_mean_age(targets: list[float]):
    def line(step: int) -> torch.Tensor:
        return torch.tensor([3.0, -1.0], dtype=torch.float64) + 0.25 * step

    anchor, state = run(ASYNC, targets, line)
    torch.testing.assert_close(anchor, line(len(targets)) - 0.25 * state.age)
    if len(targets) > 10 and min(targets) == max(targets) > 0.5:
        assert state.age == pytest.approx(targets[0])


def test_keep_zero_copies_and_keep_one_leaves_alone_bit_for_bit():
    start, now = random_weights(0), random_weights(1)
    anchor = start_anchor([("w", start)])
    blend(anchor, [("w", now)], 1.0)
    assert torch.equal(anchor["w"], start)
    blend(anchor, [("w", now)], 0.0)
    assert torch.equal(anchor["w"], now)


@given(st.floats(0, 1))
def test_weights_that_do_not_move_stay_bit_equal(keep: float):
    fixed = random_weights(0).float()
    anchor = start_anchor([("w", fixed)])
    blend(anchor, [("w", fixed)], keep)
    assert torch.equal(anchor["w"], fixed)


def test_the_anchor_of_a_bf16_model_is_float32_and_keeps_its_increments():
    now = torch.full((3,), 1.0, dtype=torch.bfloat16)
    anchor, low = start_anchor([("w", now)]), now.clone()
    assert anchor["w"].dtype == torch.float32
    step = torch.nextafter(now, torch.full_like(now, 2.0))  # one bf16 increment
    for _ in range(20):
        blend(anchor, [("w", step)], 0.99)
        low = (0.99 * low + 0.01 * step).to(torch.bfloat16)
    assert torch.equal(low, now)  # rounded away every time
    expected = 1 + (float(step[0]) - 1) * (1 - 0.99**20)
    assert anchor["w"][0].item() == pytest.approx(expected, rel=1e-5)


def test_the_anchor_shares_nothing_with_the_model():
    live = torch.zeros(2)
    anchor = start_anchor([("w", live), ("count", torch.tensor(3))])
    live += 1
    assert anchor["w"].tolist() == [0, 0]
    blend(anchor, [("w", live.requires_grad_()), ("count", torch.tensor(5))], 0.5)
    assert anchor["w"].tolist() == [0.5, 0.5]
    assert not anchor["w"].requires_grad
    assert anchor["count"].item() == 5


def test_tensors_that_do_not_match_are_refused():
    anchor = start_anchor([("a", torch.zeros(2)), ("b", torch.zeros(2))])
    with pytest.raises(ValueError, match="no current value of b"):
        blend(anchor, [("a", torch.zeros(2))], 0.5)
    with pytest.raises(ValueError, match="no 'c' of shape"):
        blend(anchor, [("c", torch.zeros(2))], 0.5)
    with pytest.raises(ValueError, match="no 'a' of shape"):
        blend(anchor, [("a", torch.zeros(3))], 0.5)
    with pytest.raises(ValueError, match="keep"):
        blend(anchor, [("a", torch.zeros(2))], 1.5)


def test_ages_by_hand():
    versions = torch.tensor([7, 5, -1, 3])
    mask = torch.tensor([1, 1, 0, 1])
    ages = behaviour_age(versions, version_now=7, steps_per_version=4, steps_since_publish=1)
    assert ages[mask.bool()].tolist() == [1, 9, 17]
    assert target_age(ages, mask) == pytest.approx(9)
    assert target_age(ages, 0 * mask) == 0.0


def test_a_trimmed_target_leaves_out_both_tails():
    ages = torch.tensor([0.0, 1, 1, 2, 96]).double()
    assert target_age(ages, torch.ones(5)) == pytest.approx(20)
    assert target_age(ages, torch.ones(5), trim=0.2) == pytest.approx(4 / 3)
    with pytest.raises(ValueError, match="trim"):
        target_age(ages, torch.ones(5), trim=0.5)


def test_a_bank_gives_each_token_the_anchor_nearest_in_age():
    ages = torch.tensor([0, 1, 3, 6, 20])
    assert nearest_anchor(ages, torch.tensor([8.0, 1.0, 2.0, 4.0])).tolist() == [1, 1, 2, 3, 0]
    # 3 lies between 2 and 4, 6 between 4 and 8: the younger


def test_what_the_resets_look_at_by_hand():
    log = math.log
    inf = torch.tensor([0.5, 0.5, 0.1], dtype=torch.float64).log()
    anchor = inf + torch.tensor([log(2), 0.0, 9.0], dtype=torch.float64)
    start = anchor + torch.tensor([log(1.5), 0.0, 9.0], dtype=torch.float64)
    mask = torch.tensor([1, 1, 0])
    found = measure_anchor(start, anchor, inf, mask, clip_low=0.2, clip_high=0.28)
    assert found.k3_anchor == pytest.approx((2 - 1 - log(2)) / 2)
    assert found.k3_start == pytest.approx((3 - 1 - log(3)) / 2)
    assert found.drift_k3 == pytest.approx((1.5 - 1 - log(1.5)) / 2)
    assert found.drift_abs_log == pytest.approx(log(1.5) / 2)
    assert found.clipped == pytest.approx(0.5)
    none = measure_anchor(start, anchor, inf, 0 * mask, clip_low=0.2, clip_high=0.28)
    assert none.k3_anchor is None
