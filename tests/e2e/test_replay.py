"""`lagwise replay` of a run of real services, by a process that knows nothing of their threads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from harness import EXAMPLE, ROOT, assert_sound, small

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]
VERSIONS = 7


def replay(run_dir: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    hidden = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
    return subprocess.run(
        [sys.executable, "-m", "shared.cli.main", "replay", str(run_dir), *arguments],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k not in hidden} | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_run_whose_learner_was_killed_is_replayed_to_the_last_digest(start) -> None:
    run = start("up", "--config", str(EXAMPLE), *small(VERSIONS))
    run.until(lambda: run.version() >= 3, 180)
    run.kill("learner-0")
    assert run.wait(200) == 0, run.output()
    assert_sound(run.summary(), VERSIONS)

    whole = replay(run.run_dir)
    told = f"replayed {VERSIONS} versions: {VERSIONS} digests equal\n"
    assert (whole.returncode, whole.stdout, whole.stderr) == (0, told, "")
    part = replay(run.run_dir, "--from", "6")
    assert (part.returncode, part.stdout) == (0, "replayed 1 versions: 1 digests equal\n")
    faster = replay(run.run_dir, "--set", "learner.optimizer.lr=1e-4", "--versions", "2")
    assert faster.returncode == 1
    assert faster.stdout.startswith("replayed 0 versions: 0 digests equal, then version 1 differs")
