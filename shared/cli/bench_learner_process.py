"""A contender of `make bench-learner` seen from outside: a process that steps when told to."""

from __future__ import annotations

import json
import os
import select
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from shared.cli.bench_learner_worker import GIVE_BACK
from shared.cli.processes import child_environment

LOAD_WITHIN_S, STEP_WITHIN_S = 300.0, 300.0


class ContenderFailed(Exception):
    """One line: who, and where the reason is."""


class Process:
    """One worker; a context manager."""

    def __init__(
        self, python: str, name: str, model: Path, data: Path, micro_tokens: int, log: Path
    ) -> None:
        """Start it; it loads while others do."""
        self.name = name
        self._log = log
        command = [python, "-m", "shared.cli.bench_learner_worker"]
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                [*command, name, str(model), str(data), str(micro_tokens)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=child_environment(
                    os.environ,
                    {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
                ),
                cwd=Path(__file__).parents[2],
            )

    def wait_loaded(self) -> None:
        """Wait until the model is in memory.

        Raises:
            ContenderFailed: it died or took too long.
        """
        self._answer(LOAD_WITHIN_S)

    def step(self, *, give_back: bool = False) -> dict[str, Any]:
        """Have one step taken; return what it took. `give_back`: its freed memory, afterwards.

        Raises:
            ContenderFailed: it died or took too long.
        """
        assert self._process.stdin is not None
        try:
            line = GIVE_BACK if give_back else ""
            self._process.stdin.write(f"{line}\n".encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            raise ContenderFailed(f"{self.name} died, see {self._log}") from None
        return self._answer(STEP_WITHIN_S)

    def _answer(self, within_s: float) -> dict[str, Any]:
        stdout = self._process.stdout
        assert stdout is not None
        deadline = time.monotonic() + within_s
        if not select.select([stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise ContenderFailed(f"{self.name}: no answer within {within_s:g} s")
        line = stdout.readline()
        if not line:
            raise ContenderFailed(f"{self.name} died, see {self._log}")
        return json.loads(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._process.kill()
        self._process.wait()
