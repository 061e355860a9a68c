import math
from dataclasses import asdict, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.algo.ewma_control import (
    ASYNC,
    AnchorMeasured,
    AnchorState,
    EwmaSettings,
    advance,
    beta_of,
    center_of_mass,
    half_life,
    mean_age,
    rescaled_beta,
    reset,
)

FREE = replace(ASYNC, auto_reset=False)


def mixture(settings: EwmaSettings, targets: list[float]) -> tuple[list[float], AnchorState]:
    """Weights of θ_n, θ_{n-1}, ... in θ̄, kept explicitly beside the state."""
    weights, state = [1.0], AnchorState()
    for target in targets:
        decision = advance(state, settings, target_age=target)
        weights = [1 - decision.keep, *(w * decision.keep for w in weights)]
        state = decision.state
    return weights, state


@given(st.floats(0.0, 0.98), st.integers(0, 60))
def test_fixed_decay_is_the_bias_corrected_recursion(beta: float, steps: int):
    weights, state = mixture(EwmaSettings(beta=beta), [0.0] * steps)
    total = sum(beta**j for j in range(steps + 1))
    assert weights == pytest.approx([beta**j / total for j in range(steps + 1)], abs=1e-12)
    assert state.weight == pytest.approx((1 - beta ** (steps + 1)) / (1 - beta))
    assert state.age == pytest.approx(mean_age(beta, steps), rel=1e-7, abs=1e-9)


def test_without_bias_correction_the_start_weighs_on():
    weights, _ = mixture(EwmaSettings(beta=0.9, bias_correction=False), [0.0] * 3)
    assert weights == pytest.approx([0.1, 0.09, 0.081, 0.729])


@given(
    st.lists(st.floats(0, 12), min_size=1, max_size=20),
    st.sampled_from(["fixed", "staleness", "age_tracking"]),
)
def test_the_state_is_the_mixture_that_the_decisions_make(targets: list[float], decay):
    weights, state = mixture(EwmaSettings(decay=decay, beta=0.7), targets)
    assert sum(weights) == pytest.approx(1.0)
    age = sum(w * j for j, w in enumerate(weights))
    square = sum(w * j * j for j, w in enumerate(weights))
    assert state.age == pytest.approx(age, abs=1e-9)
    assert state.age_square == pytest.approx(square, abs=1e-8)
    assert state.age_std == pytest.approx(math.sqrt(max(0.0, square - age**2)), abs=1e-5)
    assert state.num_updates == len(targets)


@given(st.lists(st.floats(0, 12), min_size=1, max_size=20))
def test_age_tracking_meets_its_target_or_holds(targets: list[float]):
    state = AnchorState()
    for target in targets:
        decision = advance(state, FREE, target_age=target)
        if target <= state.age + 1:
            assert decision.state.age == pytest.approx(target)
            assert decision.age_deficit == pytest.approx(0.0, abs=1e-9)
        else:
            assert decision.keep == 1.0
            assert decision.state.age == state.age + 1
            assert decision.age_deficit == pytest.approx(target - state.age - 1)
        state = decision.state


def test_from_a_reset_age_tracking_is_a_snapshot_until_it_is_old_enough():
    state = AnchorState()
    for step in range(1, 4):
        decision = advance(state, FREE, target_age=3.0)
        state = decision.state
        assert (decision.keep, state.age, state.age_std) == (1.0, step, 0.0)
    assert advance(state, FREE, target_age=3.0).keep == 3 / 4


def test_constant_staleness_makes_age_tracking_the_fixed_decay_of_that_center():
    state, target = AnchorState(), 4.0
    for _ in range(200):
        decision = advance(state, FREE, target_age=target)
        state = decision.state
    beta = beta_of(target)
    assert decision.keep == pytest.approx(target / (1 + target)) == pytest.approx(beta)
    assert state.age_std == pytest.approx(math.sqrt(beta) / (1 - beta), rel=1e-6)
    fixed = AnchorState()
    for _ in range(200):
        decision = advance(fixed, EwmaSettings(beta=beta), target_age=target)
        fixed = decision.state
    assert decision.keep == pytest.approx(beta)
    assert fixed.age == pytest.approx(target)


def test_fresh_data_alone_is_synchronous():
    for settings in (FREE, ASYNC, EwmaSettings(decay="staleness")):
        decision = advance(AnchorState(), settings, target_age=0.0)
        assert (decision.keep, decision.state.age) == (0.0, 0.0)
        assert decision.state.weight == 1.0


def test_staleness_decay_takes_beta_from_the_target_at_each_step():
    decision = advance(AnchorState(weight=2.0), EwmaSettings(decay="staleness"), target_age=3.0)
    assert decision.state.weight == pytest.approx(0.75 * 2 + 1)
    assert decision.keep == pytest.approx(1.5 / 2.5)


OLD = AnchorState(age=4.0, age_square=17.0, num_updates=9)
GOOD = AnchorMeasured(k3_anchor=0.01, k3_start=0.02, drift_k3=0.01, drift_abs_log=0.5, clipped=0.1)


@pytest.mark.parametrize(
    ("target", "measured", "events", "causes"),
    [
        (4.0, GOOD, (), ()),
        (0.4, GOOD, (), ("fresh_data",)),
        (0.5, GOOD, (), ()),
        (4.0, replace(GOOD, drift_k3=0.051), (), ("drift",)),
        (4.0, replace(GOOD, drift_k3=0.05), (), ()),
        (4.0, replace(GOOD, clipped=0.31), (), ("clipped",)),
        (4.0, GOOD, ("checkpoint_load",), ("discontinuity",)),
        (0.0, replace(GOOD, clipped=0.9), ("step_rollback",),
         ("fresh_data", "clipped", "discontinuity")),
        (4.0, None, (), ()),
    ],
)  # fmt: skip
def test_automatic_resets_by_cause(target, measured, events, causes):
    decision = advance(OLD, ASYNC, target_age=target, measured=measured, discontinuities=events)
    assert decision.causes == causes
    if causes:
        assert decision.keep == 0.0
        assert decision.state.resets == dict.fromkeys(causes, 1)
        assert decision.age_deficit == target
    # the baseline has no age logic
    same = advance(
        OLD, EwmaSettings(), target_age=target, measured=measured, discontinuities=events
    )
    assert same.causes == ()


def test_drift_can_be_measured_by_the_mean_log_ratio():
    settings = replace(ASYNC, drift_measure="abs_log")
    assert advance(OLD, settings, target_age=4.0, measured=GOOD).causes == ("drift",)


def test_an_anchor_worse_than_none_is_reset_after_so_many_steps_in_a_row():
    worse, better = AnchorMeasured(0.03, 0.02), AnchorMeasured(0.02, 0.02)
    state, causes = OLD, []
    for measured in (worse, worse, better, worse, None, worse, worse):
        decision = advance(state, ASYNC, target_age=4.0, measured=measured)
        state = decision.state
        causes.append(decision.causes)
    assert causes == [()] * 6 + [("worse_than_current",)]
    assert state.worse_steps == 0


def test_a_mixture_too_broad_for_one_version_is_reset():
    # half of it 40 steps old, half fresh
    broad = AnchorState(age=20.0, age_square=800.0)
    assert advance(broad, FREE, target_age=1.0).state.age_std > 4
    assert advance(broad, ASYNC, target_age=1.0).causes == ("spread",)
    assert advance(broad, ASYNC, target_age=20.0).causes == ()


def test_after_a_reset_the_deficit_closes_within_the_target():
    state = advance(OLD, ASYNC, target_age=4.0, discontinuities=("lr_rewarmup",)).state
    deficits = []
    for _ in range(5):
        decision = advance(state, ASYNC, target_age=3.5, measured=GOOD)
        state = decision.state
        deficits.append(decision.age_deficit)
    assert deficits == pytest.approx([2.5, 1.5, 0.5, 0.0, 0.0])


def test_a_reset_starts_the_recursion_over_and_counts():
    state = reset(reset(OLD, "discontinuity").state, "discontinuity", "drift").state
    assert state == AnchorState(num_updates=11, resets={"discontinuity": 2, "drift": 1})
    assert AnchorState(**asdict(state)) == state


def test_decay_numbers_by_hand():
    assert center_of_mass(8 / 9) == pytest.approx(8)
    assert half_life(8 / 9) == pytest.approx(5.88, abs=0.01)
    assert beta_of(8) == pytest.approx(8 / 9)
    assert rescaled_beta(8 / 9, 4) == pytest.approx(32 / 33)
    assert mean_age(0.5, 1) == pytest.approx(1 / 3)
    assert mean_age(0.9, 10**4) == pytest.approx(9)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("decay", "auto"),
        ("beta", 1.0),
        ("patience", 0),
        ("drift", -0.1),
        ("drift_measure", "k1"),
        ("clipped", math.nan),
    ],
)
def test_degenerate_settings_are_refused(key: str, value):
    with pytest.raises(ValueError, match=rf"ewma\.{key}"):
        EwmaSettings(**{key: value})


def test_a_target_that_is_no_age_is_refused():
    for target in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="target_age"):
            advance(AnchorState(), ASYNC, target_age=target)
