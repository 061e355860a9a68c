"""An environment that does what the task's payload says, in its first step."""

from __future__ import annotations

import asyncio
import ctypes
import os
import random
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from services.env_agents.environment import EnvironmentLost, Observation, StepResult
from shared.wire.messages import TaskRef

BLOCKS: list[bytearray] = []


class Misbehaving:
    def __init__(self, options: Mapping[str, Any]) -> None:
        if "refuse" in options:
            raise ValueError("refused as asked")
        self._folder = str(options.get("folder", ""))
        self._do = ""

    async def reset(self, task: TaskRef) -> Observation:
        self._do = str(task.payload.get("do", ""))
        self._note("pid", os.getpid())
        if self._do == "hang in reset":
            _block()
        return Observation("@00>")

    async def step(self, answer: str) -> StepResult:
        match self._do:
            case "hang":
                while True:
                    pass
            case "await forever":
                await asyncio.Event().wait()
            case "leak":
                while True:
                    BLOCKS.append(bytearray(16 << 20))
            case "leak to the last byte":
                size = 16 << 20
                while size > 16:
                    try:
                        while True:
                            BLOCKS.append(bytearray(size))
                    except MemoryError:
                        size //= 2
                raise MemoryError
            case "raise":
                raise ZeroDivisionError("as asked")
            case "exit":
                sys.exit(3)
            case "die":
                os._exit(7)
            case "crash":
                ctypes.string_at(0)
            case "lose its server":
                raise EnvironmentLost("server 7 hung up")
            case "fork":
                _fork(100)
                _block()
            case "daemonise":
                self._daemonise()
            case "print":
                print("{" * 100, flush=True)
            case "flood":
                return StepResult(Observation("@" * (2 << 20)))
            case "draw":
                return StepResult(Observation(f"{random.random()}"), terminated=True)
            case _:
                pass
        return StepResult(
            Observation("@01>"), reward=1.0, terminated=True, rewards={"answered": len(answer)}
        )

    def task_digest(self) -> str:
        return f"digest of {self._do}"

    async def close(self) -> None:
        self._note("closed", os.getpid())

    def _daemonise(self) -> None:
        """Leave a process behind that is in no group and no session of ours."""
        if os.fork() == 0:
            os.setsid()
            pid = os.fork()
            if pid == 0:
                time.sleep(3600)
            self._note("daemon", pid)
            os._exit(0)
        os.wait()

    def _note(self, what: str, pid: int) -> None:
        if self._folder:
            (Path(self._folder) / f"{what}-{pid}").touch()


def _block() -> None:
    time.sleep(3600)


def _fork(count: int) -> None:
    for _ in range(count):
        subprocess.Popen(["sleep", "3600"])
