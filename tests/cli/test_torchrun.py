"""torchrun as we start it: commands, exit codes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from shared.cli.config_cmd import read, validate
from shared.cli.session import ranks_of
from shared.cli.torchrun import code_of

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("failures", "code"),
    [({0: 2, 1: 1}, 2), ({0: 3}, 3), ({1: -9}, 1), ({0: -9}, 137), ({1: 2}, 1), ({}, 1)],
)
def test_the_code_is_that_of_rank_0_where_it_failed(failures: dict[int, int], code: int):
    assert code_of(failures) == code


def test_the_configuration_says_how_many_processes_a_service_is():
    overrides = ["learner.ranks=2", "logit_oracle.ranks=3"]
    models = validate(read(ROOT / "examples/frozen_lake/values.yaml", overrides))
    assert ranks_of(models) == {"learner": 2, "logit_oracle": 3, "rollout": 1, "env_agents": 1}


@pytest.mark.parametrize("code", [0, 2])
def test_ranks_are_run_for_real_and_the_code_comes_through(tmp_path: Path, code: int):
    (tmp_path / "one_rank.py").write_text(
        "import os, sys\n"
        "rank = os.environ['RANK']\n"
        "known = os.environ['LAGWISE_LAUNCHER'] == str(os.getppid())\n"
        # in one write: ranks share the pipe
        "os.write(1, f'rank {rank} of {os.environ[\"WORLD_SIZE\"]} {known}\\n'.encode())\n"
        f"sys.exit({code} if rank == '0' else 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "shared.cli.torchrun", "--standalone", "--nproc-per-node=2",
         "--max-restarts=0", "-m", "one_rank"],
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert sorted(done.stdout.splitlines()) == ["rank 0 of 2 True", "rank 1 of 2 True"]
    assert "Traceback" not in done.stderr
