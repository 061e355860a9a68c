"""The same service over a real nats-server: what a memory bus might be too kind about."""

from __future__ import annotations

import time
from pathlib import Path

from shared.runtime import nats_server
from shared.runtime.context import Context
from shared.runtime.logs import Log
from shared.runtime.nats_bus import connect
from shared.runtime.sections import BusSection
from shared.wire.codec import decode
from shared.wire.messages import Terminal
from shared.wire.trajectory import Trajectory
from tests.env_agents.rollout_stand_in import (
    SUBJECTS,
    StandInRollout,
    issue,
    make_config,
    make_ticket,
    serving,
)

NUM_TICKETS = 60


async def test_tickets_become_terminals_over_nats_and_a_dead_pod_is_noticed_at_once(
    tmp_path: Path,
) -> None:
    port = nats_server.free_port()
    config_path = tmp_path / "nats.conf"
    nats_server.write_config(config_path, port=port, store_dir=tmp_path / "js")
    server = nats_server.start(config_path, tmp_path / "nats.log")
    section = BusSection(url=f"nats://127.0.0.1:{port}", retry_s=10)
    try:
        nats_server.wait_healthy(section.url, 10, server)
        bus = await connect(section, SUBJECTS, "test", Log("test", "t"))
        env_bus = await connect(section, SUBJECTS, "env-0", Log("env_agents", "env-0"))
        await bus.create_streams()
        first = await StandInRollout(bus, "pod-a").start()  # type: ignore[arg-type]
        second = await StandInRollout(bus, "pod-b").start()  # type: ignore[arg-type]
        context = Context(
            role="env_agents",
            pod="env-0",
            incarnation="i",
            bus=env_bus,
            log=Log("env_agents", "env-0"),
        )
        await issue(bus, *(make_ticket(i) for i in range(NUM_TICKETS)))  # type: ignore[arg-type]
        started = time.monotonic()
        async with serving(context, make_config(concurrency=16, heartbeat_s=2.0)):
            stored: list[Terminal] = []
            async for batch in bus.read("terminals", 1):
                stored += [decode(record.payload, Terminal) for record in batch]
                if len(stored) >= NUM_TICKETS // 4 and first.alive:
                    await first.kill()
                if len(stored) == NUM_TICKETS:
                    break
        # Nobody waited for heartbeats: a pod without subscription is reported by the server.
        assert time.monotonic() - started < 6.0
        assert {one.ticket_id for one in stored} == {f"t{i}" for i in range(NUM_TICKETS)}
        assert all(isinstance(one.outcome, Trajectory) for one in stored)
        state = await bus.stream_state("tickets")
        assert state.num_messages == 0, "acknowledged"
        await second.kill()
        await env_bus.close()
        await bus.close()
    finally:
        server.kill()
        server.wait()
