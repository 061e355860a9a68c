"""Which steps raise which guard, and for how long."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from services.learner.config import LearnerConfig
from services.learner.staging import Scored
from services.learner.step_guards import CLEAN_STEPS, GUARDS, GuardChange, StepFacts, StepGuards
from services.learner.step_telemetry import StepTelemetry
from services.learner.trainer import StepOutcome
from shared.runtime.config import load
from shared.runtime.context import Context
from shared.runtime.logs import Log
from shared.runtime.memory_bus import MemoryBus
from shared.runtime.memory_server import MemoryServer
from shared.runtime.metrics import ServiceCollector
from shared.wire.base import Array
from shared.wire.subjects import Subjects
from shared.wire.trajectory import SamplingParams, Span, Trajectory, Turn
from shared.wire.trajectory import Sequence as TokenSequence

SOUND = {
    "d_abs_log_max": 0.3,
    "noise_floor": 1e-6,
    "sampler_tokens": 4000.0,
    "sampler_abs_log_d": 0.02,
    "sampler_mean_d": 1.003,
    "sampler_mean_d_error": 0.001,
    "sampler_temperature_off": 2.0,
    "sampler_temperature_explained": 0.01,
}


def outcome(*, steps: int = 1, moved: tuple[float, ...] = (1e-6, 0.02, 0.04), **scalars: float):
    arrays = {
        "age_s_abs_log_p99": np.array(moved),
        "age_tokens": np.array([float(value >= 0) for value in moved]),
        "age_k3_d": np.full(len(moved), 0.01),
        "age_k3_s": np.full(len(moved), 0.02),
    }
    return StepOutcome(SOUND | {"fresh_tokens": 0.0} | scalars, arrays, steps)


def guards(**tree: Any) -> StepGuards:
    return StepGuards(load(LearnerConfig, tree))


def observed(of: StepGuards, *outcomes: StepOutcome, **counts: int) -> set[str]:
    for version, one in enumerate(outcomes):
        of.observe(StepFacts(version, one, **counts))
    return {name for name, raised in of.raised.items() if raised}


def test_a_sound_run_raises_nothing():
    assert observed(guards(), *[outcome() for _ in range(9)]) == set()


def test_s_of_one_at_age_0_is_normal_and_at_older_ages_is_not():
    assert observed(guards(), outcome(), outcome(moved=(1e-6, 0.02))) == set()
    same = outcome(moved=(1e-6, 2e-6, 4e-5))
    assert observed(guards(), outcome(), same) == {"degenerate_objective", "dead_clip"}
    one_age = outcome(moved=(1e-6, 2e-6, 0.3))
    assert observed(guards(), outcome(), one_age) == set()


def test_versions_that_no_step_has_left_are_no_evidence():
    same = outcome(moved=(1e-6, 2e-6), steps=0)
    assert observed(guards(), same, same, same) == set()
    skipped = outcome(moved=(1e-6, 2e-6), skipped_steps=1.0)
    assert observed(guards(), skipped, skipped) == set()
    # the step from 0 moved the weights, that from 1 did not: age 1 is equal by right at version 2
    fresh = outcome(moved=(-1.0, 2e-6, 0.02))
    assert observed(guards(), outcome(), outcome(steps=0), fresh) == set()


def test_a_clip_that_acts_in_later_minibatches_is_not_dead():
    same = (1e-6, 2e-6, 4e-5)
    later = outcome(moved=same, last_s_abs_log_max=0.05, steps=2)
    assert observed(guards(), outcome(), later) == {"degenerate_objective"}
    never = outcome(moved=same, last_s_abs_log_max=1e-5, steps=2)
    assert observed(guards(), outcome(), never) == {"degenerate_objective", "dead_clip"}


def test_an_objective_against_the_sampler_has_no_use_for_s():
    on_rho = guards(learner={"algo": {"corrections": [], "objective": {"kind": "dppo_tv"}}})
    assert observed(on_rho, outcome(), outcome(moved=(0.0, 0.0, 0.0))) == set()


def test_in_bfloat16_age_0_is_the_measure():
    bf16 = {"model": {"dtype": "bfloat16"}}
    noisy = outcome(moved=(0.02, 0.03, 0.03), noise_floor=0.02)
    assert "degenerate_objective" in observed(guards(**bf16), noisy, noisy)
    stale = outcome(moved=(0.02, 0.03, 0.3), noise_floor=0.02)
    assert "degenerate_objective" not in observed(guards(**bf16), stale, stale)


def test_a_mask_is_dead_when_d_is_exactly_one_and_something_is_configured():
    assert observed(guards(), outcome(d_abs_log_max=0.0)) == {"dead_mask"}
    assert observed(guards(), outcome(d_abs_log_max=1e-12)) == set()
    none = {"learner": {"algo": {"corrections": []}}}
    assert observed(guards(**none), outcome(d_abs_log_max=0.0)) == set()


@pytest.mark.parametrize(
    "off",
    [
        {"abs_log_d": 0.3},
        {"mean_d": 1.2},
        {"temperature_off": 0.1, "temperature_explained": 0.6},
        {"temperature_off": -0.1, "temperature_explained": 0.6},
    ],
)
def test_a_sampler_that_is_off_is_found_where_d_measures_engines_only(off: dict[str, float]):
    everywhere = outcome(**{f"sampler_{name}": value for name, value in off.items()})
    assert observed(guards(), everywhere) == {"sampler_mismatch"}
    approximate = {
        "old_logprobs": {"route": "ewma_prox"}, "learner": {"optimizer": {"minibatches": 2}},
    }  # fmt: skip
    assert observed(guards(**approximate), everywhere) == set()  # that may be the route's own error
    fresh = {f"fresh_{n.removeprefix('sampler_')}": v for n, v in everywhere.scalars.items()}
    assert observed(guards(**approximate), outcome(**fresh)) == {"sampler_mismatch"}


def test_few_tokens_or_a_wide_error_say_nothing_of_the_sampler():
    assert observed(guards(), outcome(sampler_tokens=200.0, sampler_abs_log_d=9.0)) == set()
    assert observed(guards(), outcome(sampler_mean_d=1.4, sampler_mean_d_error=0.1)) == set()


def test_mixed_kv_and_fallback_tokens_count_under_an_exact_route_only():
    assert observed(guards(), outcome(), mixed_kv_tokens=1, fallback_tokens=1) == {
        "mixed_kv", "fallback",
    }  # fmt: skip
    rollout = {"old_logprobs": {"route": "rollout"}, "learner": {"algo": {"corrections": []}}}
    assert observed(guards(**rollout), outcome(), mixed_kv_tokens=1) == set()


def test_a_truncated_distribution_has_no_twin_under_any_route():
    rollout = {"old_logprobs": {"route": "rollout"}, "learner": {"algo": {"corrections": []}}}
    for of in (guards(), guards(**rollout)):
        assert observed(of, outcome(), truncated_sampling_tokens=1) == {"truncated_sampling"}
        assert observed(guards(), outcome(), truncated_sampling_tokens=0) == set()


def member(*, top_p: float = 1.0, top_k: int = 0) -> Scored:
    """A trajectory of two turns; the second one drawn as given."""
    ids = np.arange(8)
    sequence = TokenSequence(
        token_ids=Array.of(ids, "i4"),
        loss_mask=Array.of(np.isin(ids, (1, 2, 5, 6, 7)), "u1"),
        spans=(Span(version=0, start=1, stop=3), Span(version=0, start=5, stop=8)),
        arrays={"sampler_logprobs": Array.of(np.zeros(8), "f4")},
        turns=(
            Turn(start=1, stop=3, finish="stop", sampling=SamplingParams(max_new_tokens=4)),
            Turn(
                start=5, stop=8, finish="stop",
                sampling=SamplingParams(max_new_tokens=4, top_p=top_p, top_k=top_k),
            ),
        ),
    )  # fmt: skip
    played = Trajectory(status="done", reward=1.0, sequences=(sequence,), task_digest="d")
    return Scored("t0", 1, "", 0, played, ())


@pytest.mark.parametrize(("drawn", "tokens"), [({}, 0), ({"top_p": 0.9}, 3), ({"top_k": 50}, 3)])
def test_tokens_of_truncated_turns_are_counted(drawn: dict[str, Any], tokens: int):
    bus = MemoryBus(Subjects("guards"), MemoryServer())
    context = Context("learner", "learner-0", "i", bus, Log("learner"))
    one = outcome()
    StepTelemetry(context, LearnerConfig()).judge(0, one, [member(**drawn)], 0)
    assert one.scalars["truncated_sampling_tokens"] == tokens
    assert one.scalars["guard_truncated_sampling"] == float(tokens > 0)


def test_health_and_every_minibatch_are_metrics_with_bounded_labels():
    bus = MemoryBus(Subjects("guards"), MemoryServer())
    context = Context("learner", "learner-0", "i", bus, Log("learner"))
    one = outcome(
        ewma_age=2.0, ewma_resets_drift=3.0, snapshot_misses=1.0, rej_token_low=0.1, clip_high=0.2
    )
    one.arrays["minibatch_s_k3"] = np.array([0.0, 0.5])
    one.arrays["minibatch_clip_high"] = np.array([0.25, math.nan])
    StepTelemetry(context, LearnerConfig()).show(one)
    families = {family.name: family for family in ServiceCollector(context).collect()}

    def shown(name: str) -> dict[tuple[str, ...], float]:
        samples = families[f"lagwise_learner_{name}"].samples
        return {tuple(sample.labels.values()): sample.value for sample in samples}

    assert shown("step_ewma_age") == {(): 2.0}
    assert shown("step_snapshot_misses") == {(): 1.0}
    assert shown("ewma_resets") == {("drift",): 3.0}
    assert shown("minibatch_staleness_k3") == {("0",): 0.0, ("1",): 0.5}
    assert shown("minibatch_clip_high") == {("0",): 0.25}
    assert shown("rejected_ratio") == {("token_low",): 0.1}
    assert shown("cut_ratio") == {("clip_high",): 0.2}
    assert shown("tokens") == {("0",): 1.0, ("1",): 1.0, ("2",): 1.0}


def test_the_noise_floor_is_held_against_a_quarter_of_the_clip():
    bound = math.log1p(0.28) / 4
    assert observed(guards(), outcome(noise_floor=0.99 * bound)) == set()
    assert observed(guards(), outcome(noise_floor=1.01 * bound)) == {"noise_floor"}
    assert observed(guards(old_logprobs={"route": "ewma_prox"}), outcome(noise_floor=9.0)) == set()


def test_a_guard_is_raised_at_once_lowered_late_and_changes_are_told_once():
    of, bad = guards(), outcome(d_abs_log_max=0.0)
    assert of.observe(StepFacts(0, bad)) == [GuardChange("dead_mask", True)]
    assert of.observe(StepFacts(1, bad)) == []
    good = [of.observe(StepFacts(2 + n, outcome())) for n in range(CLEAN_STEPS)]
    assert good == [[]] * (CLEAN_STEPS - 1) + [[GuardChange("dead_mask", False)]]
    assert of.bad_steps["dead_mask"] == 2


def test_a_step_without_loss_tokens_changes_nothing():
    of = guards()
    of.observe(StepFacts(0, outcome(d_abs_log_max=0.0)))
    for version in range(9):
        assert of.observe(StepFacts(version, StepOutcome({}, {}, 0))) == []


def test_guards_are_metrics_of_one_label_scalars_and_one_line_in_the_log(
    caplog: pytest.LogCaptureFixture,
):
    bus = MemoryBus(Subjects("guards"), MemoryServer())
    context = Context("learner", "learner-0", "i", bus, Log("learner"))
    telemetry = StepTelemetry(context, LearnerConfig())
    with caplog.at_level("WARNING", logger="lagwise.learner"):
        for version in range(3):
            bad = outcome(d_abs_log_max=0.0)
            telemetry.judge(version, bad, [], 0)
            telemetry.show(bad)
    assert [record.message for record in caplog.records] == ["guard_raised"]
    assert bad.scalars["guard_dead_mask"] == 1.0
    assert bad.scalars["guard_noise_floor"] == 0.0
    families = {family.name: family for family in ServiceCollector(context).collect()}
    shown = {s.labels["name"]: s.value for s in families["lagwise_learner_guard"].samples}
    assert shown == {name: float(name == "dead_mask") for name in GUARDS}
    [steps] = families["lagwise_learner_guard_dead_mask_steps"].samples
    assert steps.value == 3.0
    assert not set(context.lease(0).gauges) & {"guard", "step_noise_floor"}
    assert families["lagwise_learner_step_noise_floor"].samples[0].value == 1e-6
