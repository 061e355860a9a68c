"""Real vLLM rollouts in a real run; `make test-vllm` brings their environment and a base model."""

import os
from pathlib import Path

import pytest
import yaml
from harness import EXAMPLE, ROOT, assert_sound, small
from upcycled import CHOICES, LAYERS, upcycle

from shared.cli.records import load
from shared.wire.trajectory import Trajectory

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(420)]

BASE = ROOT / "runs/base-vllm"
TARGETS = ("rollout-0", "env-agents-0")
VERSIONS = 2 * len(TARGETS) + 10


@pytest.mark.parametrize("mode", ["keep", "interrupt"])
def test_the_fence_holds_on_vllm_with_a_pod_and_an_env_killed(
    start, tmp_path: Path, mode: str
) -> None:
    assert os.environ.get("LAGWISE_ROLLOUT_PYTHON"), "run by make test-vllm"
    values = yaml.safe_load(EXAMPLE.read_text())
    values["logit_oracle"]["replicas"] = 0
    values["config"]["old_logprobs"]["route"] = "interrupt"
    values["config"]["model"]["source"] = str(BASE)
    values["config"]["rollout"]["engine"] = "vllm"
    values["config"]["rollout"]["sync"] = {"mode": mode}
    config = tmp_path / "vllm.yaml"
    config.write_text(yaml.safe_dump(values))
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
    values = yaml.safe_load(EXAMPLE.read_text())
    values["config"]["model"] |= {"source": str(model), "routing": "replay"}
    # Two at a time are slow: versions change in mid-episode.
    values["config"]["rollout"] |= {"engine": "vllm", "max_running": 2}
    config = tmp_path / "moe.yaml"
    config.write_text(yaml.safe_dump(values))
    run = start("up", "--config", str(config), "--audit", "300", *small(8))
    assert run.wait(300) == 0, run.output()
    summary = run.summary()
    assert_sound(summary, 8)
    assert summary["audited_tokens"] >= 100
    assert summary["audit_mismatches"] == 0
    records = load(run.run_dir)
    played = [records.terminal(seq).outcome for seq in records.terminals]
    sequences = [s for one in played if isinstance(one, Trajectory) for s in one.sequences]
    assert {r.experts.shape[1:] for s in sequences for r in s.routing} == {(LAYERS, CHOICES)}
