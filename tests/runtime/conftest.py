"""The contract's two subjects: clients of one in-memory server, clients of one nats-server."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from shared.runtime.bus import Bus
from shared.runtime.logs import Log
from shared.runtime.memory_bus import MemoryBus
from shared.runtime.memory_server import MemoryServer
from shared.runtime.nats_bus import connect
from shared.runtime.sections import BusSection
from shared.wire.subjects import Subjects

NewClient = Callable[[], Awaitable[Bus]]


@pytest.fixture(params=["memory", "nats"])
async def new_client(
    request: pytest.FixtureRequest, subjects: Subjects
) -> AsyncIterator[NewClient]:
    """Connects one more client to the same server and the same run."""
    clients: list[Bus] = []
    memory = MemoryServer(max_payload=8 * 1024 * 1024)

    async def connect_one() -> Bus:
        client: Bus
        if request.param == "memory":
            client = MemoryBus(subjects, memory)
        else:
            section = BusSection(
                url=request.getfixturevalue("nats_server").url,
                connect_timeout_s=10,
                request_timeout_s=2,
                retry_s=10,
                max_stream_bytes=256 * 1024 * 1024,
            )
            client = await connect(section, subjects, "contract", Log("test"))
        clients.append(client)
        return client

    yield connect_one
    for client in clients:
        await client.close()


@pytest.fixture
async def bus(new_client: NewClient) -> Bus:
    """A client, streams created."""
    client = await new_client()
    await client.create_streams()
    return client
