from __future__ import annotations

import asyncio

from shared.runtime.logs import Log
from shared.runtime.nats_bus import connect
from shared.runtime.sections import BusSection

PAGE = 100_000
"""What the server lists in one answer."""


async def test_more_subjects_than_fit_one_answer_are_all_listed(nats_server, subjects) -> None:
    bus = await connect(BusSection(url=nats_server.url), subjects, "list", Log("test"))
    try:
        await bus.create_streams()
        wanted = [subjects.chunk("u", index) for index in range(PAGE + 3)]
        for subject in wanted:
            await bus.publish(subject, b"")
        async with asyncio.timeout(30):
            while (await bus.stream_state("chunks")).num_messages < len(wanted):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        pattern = f"{subjects.prefix}.chunk.u.*"
        assert await bus.subjects_of("chunks", pattern) == sorted(wanted)
        await bus.purge("chunks", 1 << 40)
    finally:
        await bus.close()
