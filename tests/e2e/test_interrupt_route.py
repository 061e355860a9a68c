"""The `interrupt` route with real processes: no oracle, exact, whatever is killed."""

from pathlib import Path

import pytest
import yaml
from harness import EXAMPLE, assert_sound, small

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

TARGETS = ("env-agents-0", "learner-0", "rollout-0", "nats", "learner-0")
VERSIONS = 2 * len(TARGETS) + 20
"""Those after the last kill are for fast machines: the run must not end before it."""


def test_one_kill_of_every_target_leaves_every_old_logit_exact(start, tmp_path: Path) -> None:
    values = yaml.safe_load(EXAMPLE.read_text())
    values["logit_oracle"]["replicas"] = 0
    values["config"]["old_logprobs"]["route"] = "interrupt"
    config = tmp_path / "interrupt.yaml"
    config.write_text(yaml.safe_dump(values))
    run = start("up", "--config", str(config), "--audit", "300", *small(VERSIONS))
    run.kill_in_turn(TARGETS)
    assert run.wait(240) == 0, run.output()
    summary = run.summary()
    assert_sound(summary, VERSIONS)
    assert summary["audited_tokens"] >= 100
    assert summary["audit_mismatches"] == 0
