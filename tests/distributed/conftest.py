"""Starts the ranks of a multi-process test and gives back what the first one wrote."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.runtime.nats_server import free_port

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
RANK_TIMEOUT_S = 240


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def run_ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Run `CASE` (module:function of this folder) on ranks; return the folder they wrote into."""

    def run(case: str, ranks: int, worker: str = "worker.py", **arguments: Any) -> Path:
        folder = tmp_path_factory.mktemp(case.replace(":", "-"))
        (folder / "arguments.json").write_text(json.dumps({**arguments, "out": str(folder)}))
        env = {
            **os.environ,
            "WORLD_SIZE": str(ranks),
            "RENDEZVOUS": str(folder / "rendezvous"),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE)]),
        }
        logs = [(folder / f"rank{rank}.log").open("w") for rank in range(ranks)]
        processes = [
            subprocess.Popen(
                [sys.executable, str(HERE / worker), case, str(folder / "arguments.json")],
                env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            for rank, log in enumerate(logs)
        ]
        try:
            codes = [process.wait(timeout=RANK_TIMEOUT_S) for process in processes]
        except subprocess.TimeoutExpired:
            codes = [-1]
        finally:
            for process in processes:
                process.kill()
                process.wait()
            for log in logs:
                log.close()
        if any(codes):
            tails = [(folder / f"rank{r}.log").read_text()[-3000:] for r in range(ranks)]
            pytest.fail(f"{case}: exit codes {codes}\n" + "\n---\n".join(tails))
        return folder

    return run
