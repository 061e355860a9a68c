"""The `interrupt` route with real processes: no oracle, exact, whatever is killed."""

from pathlib import Path

import pytest
from harness import assert_sound, example, small

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

TARGETS = ("env-agents-0", "learner-0", "rollout-0", "nats", "learner-0")
VERSIONS = 2 * len(TARGETS) + 20
"""Those after the last kill are for fast machines: the run must not end before it."""


def test_one_kill_of_every_target_leaves_every_old_logit_exact(start, tmp_path: Path) -> None:
    config = example(tmp_path / "interrupt.yaml", 0, old_logprobs={"route": "interrupt"})
    run = start("up", "--config", str(config), "--audit", "300", *small(VERSIONS))
    run.kill_in_turn(TARGETS)
    assert run.wait(240) == 0, run.output()
    summary = run.summary()
    assert_sound(summary, VERSIONS)
    assert summary["audited_tokens"] >= 100
    assert summary["audit_mismatches"] == 0
