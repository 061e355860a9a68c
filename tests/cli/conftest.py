"""Fixtures of the command's tests."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from shared.runtime.memory_bus import MemoryBus
from shared.wire.subjects import Subjects


@pytest.fixture
async def bus() -> AsyncIterator[MemoryBus]:
    """An in-memory bus of run `r`, with its streams."""
    bus = MemoryBus(Subjects("r"))
    await bus.create_streams()
    yield bus
    await bus.close()
