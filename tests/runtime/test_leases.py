"""Who is alive, by a clock in the hand of the test."""

from __future__ import annotations

import asyncio

from shared.runtime.leases import KEEP_EXPIRED, STOPPED, LeaseBoard, LeaseTable
from shared.runtime.memory_bus import MemoryBus
from shared.wire.codec import encode
from shared.wire.telemetry import Lease


def lease(pod: str = "p1", role: str = "rollout", reason: str = "", version: int = 0) -> Lease:
    return Lease(
        role=role, pod=pod, incarnation="i", pid=1, sent_at=-1e9, ready=not reason, reason=reason,
        version=version,
    )  # fmt: skip


def pods(leases: list[Lease]) -> list[str]:
    return [one.pod for one in leases]


def test_a_lease_lives_until_its_expiry_by_the_hearers_clock():
    table = LeaseTable(6.0)
    table.hear(lease(), now=100.0)
    assert pods(table.live("rollout", 105.9)) == ["p1"]
    assert table.live("rollout", 106.0) == []
    assert pods(table.latest(106.0)) == ["p1"]


def test_the_latest_lease_of_a_pod_counts_and_roles_are_apart():
    table = LeaseTable(6.0)
    table.hear(lease(version=1), now=0.0)
    table.hear(lease(version=2), now=1.0)
    table.hear(lease(pod="o1", role="logit_oracle"), now=1.0)
    assert [one.version for one in table.live("rollout", 2.0)] == [2]
    assert pods(table.live("logit_oracle", 2.0)) == ["o1"]


def test_an_unready_pod_is_alive_and_a_stopped_one_is_not():
    table = LeaseTable(6.0)
    table.hear(lease("loading", reason="no weights yet"), now=0.0)
    table.hear(lease("gone", reason=STOPPED), now=0.0)
    assert pods(table.live("rollout", 1.0)) == ["loading"]


def test_a_pod_silent_for_very_long_is_forgotten():
    table = LeaseTable(1.0)
    table.hear(lease("old"), now=0.0)
    table.hear(lease("new"), now=KEEP_EXPIRED - 1.0)
    assert pods(table.latest(KEEP_EXPIRED + 0.5)) == ["new"]


def test_after_deafness_every_pod_gets_its_time_anew():
    table = LeaseTable(6.0)
    table.hear(lease(), now=0.0)
    table.forgive(now=60.0)
    assert pods(table.live("rollout", 65.0)) == ["p1"]
    assert table.live("rollout", 66.0) == []


async def test_nobody_expires_while_the_bus_is_away_and_time_starts_anew_after_it(
    memory_bus: MemoryBus,
):
    now = [0.0]
    board = LeaseBoard(memory_bus, 6.0, clock=lambda: now[0])
    await board.start()
    sender = MemoryBus(memory_bus.subjects, memory_bus.server)
    await sender.publish(sender.subjects.lease("rollout", "p1"), b"no lease")
    await sender.publish(sender.subjects.lease("rollout", "p1"), encode(lease()))
    await asyncio.sleep(0.01)
    assert memory_bus.counters["unreadable_leases"] == 1
    assert pods(board.live("rollout")) == ["p1"]
    memory_bus.server.set_up(False)
    now[0] = 100.0
    assert pods(board.live("rollout")) == ["p1"]
    memory_bus.server.set_up(True)
    memory_bus.counters["reconnects"] += 1
    assert pods(board.live("rollout")) == ["p1"]
    now[0] = 107.0
    assert board.live("rollout") == []
    await board.close()
    await sender.close()
