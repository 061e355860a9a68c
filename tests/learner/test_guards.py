"""What is refused at start, and with which words."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from services.learner.config import LearnerConfig
from services.learner.guards import objections
from shared.runtime.config import load
from shared.runtime.errors import ConfigError

ROLLOUT = {"old_logprobs": {"route": "rollout"}}
CURRENT = {"old_logprobs": {"route": "current_recompute"}}


def learner(corrections: list[Any] | None = None, **section: Any) -> dict[str, Any]:
    return {
        "learner": section | ({} if corrections is None else {"algo": {"corrections": corrections}})
    }


def ewma(**settings: Any) -> dict[str, Any]:
    return {"old_logprobs": {"route": "ppo_ewma_async", "ewma": settings}}


REFUSED = {
    "the bypass with a mask": (ROLLOUT, "dead_mask"),
    "the bypass with a truncation": (ROLLOUT | learner([{"kind": "tis"}]), "dead_mask"),
    "a proxy that is the sampler": (
        {"old_logprobs": {"route": "interp_prox_linear"}, "admission": {"max_staleness": 1}},
        "dead_mask",
    ),
    "current weights and one minibatch": (CURRENT, "dead_clip"),
    "an anchor that forgets everything": (ewma(beta=0.0), "dead_clip"),
    "an anchor reset at every step": (ewma(auto_reset=True, fresh_below=9.0), "dead_clip"),
    "nothing that limits stale tokens": (
        CURRENT | learner([], allow_degenerate=["dead_clip"]), "degenerate_objective",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_dead_part_is_refused_with_key_reason_fix_and_override(case: str):
    tree, name = REFUSED[case]
    with pytest.raises(ConfigError) as caught:
        load(LearnerConfig, tree)
    line = str(caught.value)
    assert "\n" not in line
    assert "; use " in line
    assert f"learner.allow_degenerate: [{name}]" in line


@pytest.mark.parametrize("case", REFUSED)
def test_a_baseline_may_name_it_and_is_warned(case: str):
    tree, name = REFUSED[case]
    own = tree.get("learner", {})
    allowed = {"allow_degenerate": [*own.get("allow_degenerate", []), name]}
    config = load(LearnerConfig, tree | {"learner": own | allowed})
    assert name in {one.name for one in objections(config)}


SOUND = (
    {},
    {"old_logprobs": {"route": "snapshot_old"}},
    {"old_logprobs": {"route": "ewma_prox"}},
    ROLLOUT | learner([]),
    ROLLOUT | learner([{"kind": "unit"}]),
    CURRENT | learner(optimizer={"minibatches": 2}, algo={"corrections": []}),
    CURRENT | {"admission": {"max_staleness": 0}} | learner([]),  # synchronous: S = 1 everywhere
    CURRENT | learner(algo={"corrections": [], "objective": {"kind": "dppo_tv"}}),  # on ρ
    {"old_logprobs": {"route": "interp_prox_linear"}} | learner([]),
)


@pytest.mark.parametrize("tree", SOUND)
def test_what_can_act_is_accepted(tree: dict[str, Any]):
    assert not [one for one in objections(load(LearnerConfig, tree)) if one.name]


def test_the_defaults_are_not_even_warned_about():
    assert objections(LearnerConfig()) == []


def test_thresholds_of_a_proxy_that_never_bind_are_named():
    algo = {
        "corrections": [{"kind": "icepop", "low": 0.5, "high": 2.0}],
        "objective": {"kind": "ppo", "low": 0.2, "high": 0.2},
    }
    tree = {"old_logprobs": {"route": "interp_prox_loglinear"}, "learner": {"algo": algo}}
    [warned] = objections(load(LearnerConfig, tree))
    assert "mask_high, mask_low never binds at ages 1 to 4" in warned.line
    older = load(LearnerConfig, tree | {"admission": {"max_staleness": 8}})
    assert objections(older) == []  # the mask up to age 4, the clip from 5 on


def test_a_mask_that_acts_on_staleness_and_an_unread_route_are_warned_about():
    [entangled] = objections(load(LearnerConfig, CURRENT | learner(optimizer={"minibatches": 2})))
    assert "D carries the staleness" in entangled.line
    unread = learner(algo={"corrections": [], "objective": {"kind": "m2po"}})
    [unused] = objections(load(LearnerConfig, unread))
    assert "computed and not used" in unused.line


def test_a_name_that_is_no_guard_is_refused():
    with pytest.raises(ConfigError, match=r"allow_degenerate.*dead_clip"):
        load(LearnerConfig, learner(allow_degenerate=["dead_mas"]))


def test_the_process_exits_with_2_and_one_line(tmp_path: Any):
    values = tmp_path / "values.yaml"
    values.write_text("config:\n  old_logprobs: {route: rollout}\n")
    ran = subprocess.run(
        [sys.executable, "-m", "services.learner", "--config", str(values)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert ran.returncode == 2
    plain = [line for line in ran.stderr.splitlines() if not line.startswith("{")]
    assert len(plain) == 1
    assert "makes D = 1, so that icepop, veto can never act; use" in plain[0]
