"""The kill matrix: every target, early, in the middle and late; also twice in a row."""

import pytest
from harness import EXAMPLE, assert_sound, gone, small

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(400)]

TARGETS = (
    "learner-0", "rollout-0", "env-agents-0", "logit-oracle-0", "nats", "recorder",
)  # fmt: skip
VERSIONS = 10


@pytest.mark.parametrize("phase", [0, 4, 8])
@pytest.mark.parametrize("pod", TARGETS)
def test_a_kill_of_one_target_loses_and_repeats_nothing(start, pod: str, phase: int) -> None:
    run = start("up", "--config", str(EXAMPLE), "--audit", "300", *small(VERSIONS))
    run.until(lambda: run.version() >= phase, 180)
    run.kill(pod)
    assert run.wait(300) == 0, run.output()
    assert_sound(run.summary(), VERSIONS)
    assert pod in {e["pod"] for e in run.events("restart")}


@pytest.mark.parametrize("pod", TARGETS)
def test_a_kill_before_anything_was_published_is_recovered_from(start, pod: str) -> None:
    run = start("up", "--config", str(EXAMPLE), *small(3))
    run.kill(pod)
    assert run.wait(300) == 0, run.output()
    assert_sound(run.summary(), 3)


@pytest.mark.parametrize("pod", ["learner-0", "nats"])
def test_three_kills_in_a_row_lose_nothing(start, pod: str) -> None:
    run = start("up", "--config", str(EXAMPLE), *small(VERSIONS))
    run.until(lambda: run.version() >= 3, 180)
    for number in range(3):
        run.kill(pod)
        run.until(lambda n=number: len(run.events("restart")) > n, 30)
        run.until(lambda n=number: len(run.events("started")) > 8 + n, 30)
    assert run.wait(300) == 0, run.output()
    assert_sound(run.summary(), VERSIONS)


def test_both_rollouts_at_once_lose_nothing(start) -> None:
    run = start("up", "--config", str(EXAMPLE), *small(VERSIONS))
    run.until(lambda: run.version() >= 3, 180)
    run.kill("rollout-0")
    run.kill("rollout-1")
    assert run.wait(300) == 0, run.output()
    assert_sound(run.summary(), VERSIONS)


def test_kill_9_of_the_supervisor_leaves_nothing_running_and_the_run_resumes(start) -> None:
    arguments = ["up", "--config", str(EXAMPLE), *small(VERSIONS)]
    run = start(*arguments)
    run.until(lambda: run.version() >= 3, 180)
    processes = run.descendants()
    run.process.kill()
    run.process.wait()
    again = start(*arguments, "--resume", "--audit", "300")
    assert again.wait(300) == 0, again.output()
    assert gone(processes)
    assert_sound(again.summary(), VERSIONS)


@pytest.mark.parametrize("pod", ["rollout-0", "logit-oracle-0", "learner-0"])
def test_a_frozen_service_is_killed_restarted_and_nothing_is_lost(start, pod: str) -> None:
    run = start("up", "--config", str(EXAMPLE), *small(VERSIONS))
    run.until(lambda: run.version() >= 3, 180)
    frozen = run.live(pod)
    assert frozen is not None
    frozen.suspend()
    assert run.wait(300) == 0, run.output()
    assert_sound(run.summary(), VERSIONS)
    assert [e["pod"] for e in run.events("hung")] in ([pod], [])  # [] when it was not missed
