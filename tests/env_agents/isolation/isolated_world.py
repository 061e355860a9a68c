"""An isolated environment that misbehaves on request."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from services.env_agents.config import IsolationSection
from services.env_agents.isolation.cells import Cells
from services.env_agents.isolation.isolated import IsolatedEnvironment
from shared.runtime.memory_server import MemoryServer
from shared.wire.messages import TaskRef
from tests.env_agents.rollout_stand_in import make_context

PATH = "tests.env_agents.isolation.misbehaving:Misbehaving"


@asynccontextmanager
async def running(options: dict[str, Any] | None = None, **section: Any) -> AsyncIterator[Cells]:
    cells = Cells(
        make_context(MemoryServer()),
        PATH,
        options or {},
        IsolationSection(mode="process", **section),
    )
    await cells.start()
    try:
        yield cells
    finally:
        await cells.stop()


def task(do: str = "") -> TaskRef:
    return TaskRef(dataset="d", split="train", index=0, seed=0, payload={"do": do})


async def ready(cells: Cells, do: str = "") -> IsolatedEnvironment:
    """An environment after its reset."""
    environment = IsolatedEnvironment(cells)
    await environment.reset(task(do))
    return environment


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (ProcessLookupError, FileNotFoundError):  # it may go between the two looks
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


async def gone(pid: int, within_s: float = 5.0) -> bool:
    for _ in range(int(within_s / 0.02)):
        if not alive(pid):
            return True
        await asyncio.sleep(0.02)
    return False


def noted(folder: Path, what: str) -> list[int]:
    return [int(path.name.split("-")[1]) for path in folder.glob(f"{what}-*")]
