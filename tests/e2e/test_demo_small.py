"""The whole thing with real processes: learns, survives kills, resumes, leaves nothing running."""

import pytest
from harness import EXAMPLE, assert_sound, gone, small

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

EVERY_TARGET = ("rollout-0", "env-agents-0", "logit-oracle-0", "learner-0", "nats", "recorder")


def test_the_demo_kills_a_rollout_recovers_and_the_audit_agrees(start) -> None:
    run = start("demo", *small(versions=10, eval_episodes=32))
    code = run.wait(240)
    summary = run.summary()
    assert_sound(summary, versions=10)
    assert [k["pod"] for k in run.facts()["kills"]] == ["rollout-1"]
    assert run.facts()["restarts"]["rollout"] == 1
    output = run.output()
    assert "KILL -9 rollout-1" in output
    assert "rollout-1 is back" in output
    assert summary["audited_tokens"] >= 2000
    assert summary["audit_mismatches"] == 0
    assert summary["eval_episodes"] == 32
    assert code == (0 if summary["ok"] else 1)
    assert (run.run_dir / "report.html").stat().st_size > 10_000


def test_one_kill_of_every_target_in_one_run_loses_and_repeats_nothing(start) -> None:
    versions = 2 * len(EVERY_TARGET) + 18  # so that a fast machine does not end before the last
    run = start("up", "--config", str(EXAMPLE), "--audit", "300", *small(versions))
    run.kill_in_turn(EVERY_TARGET)
    assert run.wait(240) == 0, run.output()
    assert_sound(run.summary(), versions)
    assert {e["pod"] for e in run.events("restart")} >= set(EVERY_TARGET)


def test_ctrl_c_leaves_nothing_running_and_a_resumed_run_ends_without_loss(start) -> None:
    arguments = ["up", "--config", str(EXAMPLE), *small(versions=20)]
    run = start(*arguments)
    run.until(lambda: run.version() >= 2, 120)
    processes = run.descendants()
    run.interrupt()
    assert run.wait(60) == 130, run.output()
    assert gone(processes)
    assert "--resume" in run.output()
    again = start(*arguments, "--resume", "--audit", "300")
    assert again.wait(180) == 0, again.output()
    assert_sound(again.summary(), versions=20)
