"""A real run as a user starts it, and the means to hurt it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import yaml

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples/frozen_lake/values.yaml"


class Run:
    """One `lagwise` process over one run folder."""

    def __init__(self, run_dir: Path, *arguments: str) -> None:
        self.run_dir = run_dir
        self._out = (run_dir.parent / f"{run_dir.name}.out").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "shared.cli.main", *arguments, "--run-dir", str(run_dir)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=self._out,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    # --- looking
    def output(self) -> str:
        self._out.seek(0)
        return self._out.read()

    def events(self, kind: str) -> list[dict[str, Any]]:
        path = self.run_dir / "events.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [e for e in map(json.loads, lines) if e["event"] == kind]

    def version(self) -> int:
        """Newest version that the recorder has kept aside, -1 before the first."""
        kept = (self.run_dir / "archive" / "versions").glob("[0-9]*.safetensors")
        return max((int(path.stem) for path in kept), default=-1)

    def live(self, pod: str) -> psutil.Process | None:
        pids = [e["pid"] for e in self.events("started") if e["pod"] == pod]
        if not pids or not psutil.pid_exists(pids[-1]):
            return None
        return psutil.Process(pids[-1])

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    # --- hurting
    def kill(self, pod: str) -> None:
        """Kill a service with -9, as nobody's supervisor would."""
        self.until(lambda: self.live(pod) is not None, 20)
        process = self.live(pod)
        assert process is not None
        process.send_signal(signal.SIGKILL)

    def kill_in_turn(self, pods: Sequence[str], *, every: int = 2, first: int = 0) -> None:
        """Kill the first from version `first` on, the others each `every` versions later.

        A kill waits until the supervisor has restarted the one before.
        """
        for number, pod in enumerate(pods):
            self.until(lambda due=first + every * number: self.version() >= due, 120)
            self.kill(pod)
            self.until(lambda n=number: len(self.events("restart")) > n, 30)

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    # --- waiting
    def until(self, condition: Callable[[], bool], bound_s: float) -> None:
        deadline = time.monotonic() + bound_s
        while not condition():
            assert self.process.poll() is None, self.output()
            assert time.monotonic() < deadline, f"not within {bound_s} s:\n{self.output()}"
            time.sleep(0.05)

    def wait(self, bound_s: float) -> int:
        """Return the exit code."""
        try:
            return self.process.wait(bound_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {bound_s} s:\n{self.output()}") from None

    def facts(self) -> dict[str, Any]:
        return json.loads((self.run_dir / "run.json").read_text())

    def summary(self) -> dict[str, Any]:
        return json.loads((self.run_dir / "summary.json").read_text())

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._out.close()


def small(versions: int, eval_episodes: int = 0) -> list[str]:
    """Arguments of a run that takes seconds.

    Small lakes: the base reaches their goal often enough that nearly every version trains on
    something, or the audit's controls would have nothing to tell apart.
    """
    settings = {
        "task.options.size": 3,
        "task.options.p": 0.9,
        "learner.versions": versions,
        "learner.eval.episodes": eval_episodes,
        "learner.checkpoint.every_versions": 2,
        "admission.groups_per_version": 8,
    }
    return [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]


def example(file: Path, oracles: int = 1, **sections: dict[str, Any]) -> Path:
    """Write the example's values with other settings in sections of `config`; return the file."""
    values = yaml.safe_load(EXAMPLE.read_text())
    values["logit_oracle"]["replicas"] = oracles
    for name, settings in sections.items():
        values["config"][name] |= settings
    file.write_text(yaml.safe_dump(values))
    return file


def gone(processes: list[psutil.Process]) -> bool:
    return not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes)


def assert_sound(summary: dict[str, Any], versions: int) -> None:
    """Nothing lost, nothing twice, nothing inexact, nothing too old."""
    assert summary["policy_versions"] == versions + 1, summary
    assert summary["trajectories_lost"] == 0, summary
    assert summary["trajectories_duplicated"] == 0, summary
    assert summary["old_logits_exact_ratio"] == 1.0, summary
    assert summary["staleness_max"] <= summary["staleness_bound"], summary
    assert summary["sound"], summary["problems"]
