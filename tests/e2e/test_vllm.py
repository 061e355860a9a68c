"""Real vLLM rollouts in a real run; `make test-vllm` brings their environment and a base model."""

import os
from pathlib import Path

import pytest
from harness import ROOT, assert_sound, example, small
from upcycled import CHOICES, LAYERS, sequences_of, upcycle

from shared.cli.records import load

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(420)]

BASE = ROOT / "runs/base-vllm"
TARGETS = ("rollout-0", "env-agents-0")
VERSIONS = 2 * len(TARGETS) + 10


@pytest.mark.parametrize("mode", ["keep", "interrupt"])
def test_the_fence_holds_on_vllm_with_a_pod_and_an_env_killed(
    start, tmp_path: Path, mode: str
) -> None:
    assert os.environ.get("LAGWISE_ROLLOUT_PYTHON"), "run by make test-vllm"
    config = example(
        tmp_path / "vllm.yaml",
        0,
        old_logprobs={"route": "interrupt"},
        model={"source": str(BASE)},
        rollout={"engine": "vllm", "sync": {"mode": mode}},
    )
    run = start("up", "--config", str(config), "--audit", "300", *small(VERSIONS))
    run.kill_in_turn(TARGETS, first=1)
    assert run.wait(240) == 0, run.output()
    summary = run.summary()
    assert_sound(summary, VERSIONS)
    assert summary["audited_tokens"] >= 100
    assert summary["audit_mismatches"] == 0
    # Stopped by SIGTERM at the end: drained, with the engines gone, and no second signal taken in.
    ends = {e["pod"]: e["code"] for e in run.events("exited")}
    assert {pod: code for pod, code in ends.items() if pod.startswith("rollout")} == {
        "rollout-0": 0,
        "rollout-1": 0,
    }


def test_a_mixture_of_experts_is_replayed_as_vllm_routed_it(start, tmp_path: Path) -> None:
    model = tmp_path / "moe"
    upcycle(BASE, model)
    config = example(
        tmp_path / "moe.yaml",
        model={"source": str(model), "routing": "replay"},
        rollout={"engine": "vllm", "max_running": 2},  # slow: versions change in mid-episode
    )
    run = start("up", "--config", str(config), "--audit", "300", *small(8))
    assert run.wait(300) == 0, run.output()
    summary = run.summary()
    assert_sound(summary, 8)
    assert summary["audited_tokens"] >= 100
    assert summary["audit_mismatches"] == 0
    sequences = sequences_of(load(run.run_dir))
    assert {r.experts.shape[1:] for s in sequences for r in s.routing} == {(LAYERS, CHOICES)}
