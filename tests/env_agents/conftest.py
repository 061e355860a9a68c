"""One MemoryServer with its streams, and a client to look at it with."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from shared.runtime.memory_bus import MemoryBus
from shared.runtime.memory_server import MemoryServer
from tests.env_agents.rollout_stand_in import SUBJECTS, StandInRollout


@pytest.fixture
async def bus() -> AsyncIterator[MemoryBus]:
    client = MemoryBus(SUBJECTS, MemoryServer(), name="test")
    await client.create_streams()
    yield client
    await client.close()


@pytest.fixture
async def rollout(bus: MemoryBus) -> AsyncIterator[StandInRollout]:
    started = await StandInRollout(bus, "pod-a").start()
    yield started
    await started.kill()
