"""The supervisor over real, tiny processes: restarts, refusals, and nothing left running."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
FAKE_RUN = Path(__file__).with_name("fake_run.py")


def until(condition: Callable[[], bool], bound_s: float = 20.0) -> None:
    deadline = time.monotonic() + bound_s
    while not condition():
        assert time.monotonic() < deadline, "not within the bound"
        time.sleep(0.02)


class Run:
    """One supervisor process under test."""

    def __init__(self, run_dir: Path, *children: str) -> None:
        self.run_dir = run_dir
        self.process = subprocess.Popen(
            [sys.executable, str(FAKE_RUN), str(run_dir), *children],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def events(self, kind: str = "") -> list[dict]:
        path = self.run_dir / "events.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [e for e in map(json.loads, lines) if not kind or e["event"] == kind]

    def wait_started(self, count: int) -> list[psutil.Process]:
        until(lambda: len(self.events("started")) >= count)
        return [psutil.Process(e["pid"]) for e in self.events("started")]

    def result(self, bound_s: float = 20.0) -> dict:
        out, _ = self.process.communicate(timeout=bound_s)
        return json.loads(out)

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def begin(*children: str) -> Run:
        runs.append(Run(tmp_path / "run", *children))
        return runs[-1]

    yield begin
    for run in runs:
        with suppress(ProcessLookupError):
            run.process.kill()
        run.process.communicate()


def gone(processes: list[psutil.Process]) -> bool:
    return not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes)


def test_a_run_ends_with_its_learner_and_stops_the_others_in_order(start) -> None:
    run = start(
        "learner-0:learner:exits_after:0.5", "rollout-0:rollout:polite", "env-0:env_agents:polite"
    )
    assert run.result() == {"code": 0, "reason": "done"}
    assert {(e["pod"], e["signal"]) for e in run.events("stopping")} == {
        ("env-0", "term"), ("rollout-0", "term"),
    }  # fmt: skip
    assert (run.run_dir / "logs" / "rollout-0.log").read_text().split() == ["up", "drained"]
    facts = json.loads((run.run_dir / "run.json").read_text())
    assert facts["exit"] == "done"
    assert facts["restarts"] == {"learner": 0, "rollout": 0, "env_agents": 0}


def test_a_child_that_dies_is_restarted_with_back_off_and_counted(start) -> None:
    run = start("learner-0:learner:exits_after:2.0", "rollout-0:rollout:dies_times:3")
    assert run.result()["code"] == 0
    restarts = run.events("restart")
    assert [(e["pod"], e["cause"]) for e in restarts] == [("rollout-0", "exit code 1: boom")] * 3
    assert [e["delay_s"] for e in restarts] == pytest.approx([0.1, 0.2, 0.4])
    assert json.loads((run.run_dir / "run.json").read_text())["restarts"]["rollout"] == 3


def test_exit_code_2_is_not_restarted_and_its_last_line_is_shown(start) -> None:
    run = start("learner-0:learner:polite", "rollout-0:rollout:refuses")
    assert run.result() == {
        "code": 2, "reason": "rollout-0: model directory /nowhere is missing",
    }  # fmt: skip
    assert run.events("restart") == []
    assert run.process.returncode == 2


def test_a_child_that_never_stays_up_ends_the_run(start) -> None:
    run = start("learner-0:learner:polite", "rollout-0:rollout:dies_times:99")
    result = run.result()
    assert result["code"] == 1
    assert result["reason"] == "rollout-0 died 5 times in a row: exit code 1: boom"


def test_ctrl_c_drains_and_leaves_nothing_running(start) -> None:
    run = start("learner-0:learner:polite", "rollout-0:rollout:stubborn", "nats:nats:polite")
    run.wait_started(3)
    until(lambda: (run.run_dir / "logs/rollout-0.log").exists())
    until(lambda: all("up" in p.read_text() for p in (run.run_dir / "logs").iterdir()))
    processes = run.descendants()
    assert len(processes) == 3
    os.kill(run.process.pid, signal.SIGINT)
    assert run.result() == {"code": 130, "reason": "interrupted"}
    assert gone(processes)
    assert [(e["pod"], e["signal"]) for e in run.events("stopping")] == [
        ("learner-0", "term"), ("rollout-0", "term"), ("rollout-0", "kill"), ("nats", "term"),
    ]  # fmt: skip


def test_kill_9_of_the_supervisor_leaves_nothing_running(start) -> None:
    run = start("learner-0:learner:polite", "rollout-0:rollout:stubborn", "env-0:env_agents:polite")
    run.wait_started(3)
    until(lambda: len(run.descendants()) == 3)
    processes = run.descendants()
    os.kill(run.process.pid, signal.SIGKILL)
    run.process.wait()
    until(lambda: gone(processes), bound_s=5.0)


def test_what_a_child_started_goes_with_the_child(start) -> None:
    run = start("learner-0:learner:polite", "rollout-0:rollout:parent")
    until(lambda: len(run.descendants()) == 3)
    processes = run.descendants()
    os.kill(run.process.pid, signal.SIGTERM)
    assert run.result()["code"] == 130
    until(lambda: gone(processes), bound_s=5.0)


def test_a_second_supervisor_on_the_same_folder_is_refused(start, tmp_path: Path) -> None:
    start("learner-0:learner:polite").wait_started(1)
    second = subprocess.run(
        [sys.executable, str(FAKE_RUN), str(tmp_path / "run"), "learner-0:learner:polite"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert second.returncode != 0
    assert "another supervisor owns it" in second.stderr
