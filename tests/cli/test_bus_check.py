"""What `helm test` asks of a release: a lease from every role that has pods."""

from __future__ import annotations

import asyncio
import time

import pytest

from shared.cli.bus_check import leases, main
from shared.runtime.memory_bus import MemoryBus
from shared.wire.codec import encode
from shared.wire.telemetry import Lease


async def said(bus: MemoryBus, *speaking: str, roles: tuple[str, ...]) -> dict[str, bool]:
    asking = asyncio.create_task(leases(bus, 0.3, roles))
    await asyncio.sleep(0.05)
    for role in speaking:
        one = Lease(role=role, pod="p", incarnation="i", pid=1, sent_at=time.time(), ready=True)
        await bus.publish(bus.subjects.lease(role, "p"), encode(one))
    return {answer.question: answer.ok for answer in await asking}


async def test_a_role_without_a_lease_is_named(memory_bus: MemoryBus):
    heard = await said(memory_bus, "learner", roles=("learner", "rollout"))
    assert heard == {"leases of learner": True, "leases of rollout": False}


async def test_a_role_that_has_no_pods_is_not_waited_for(memory_bus: MemoryBus):
    heard = await said(memory_bus, "learner", "rollout", roles=("learner",))
    assert heard == {"leases of learner": True}


def test_an_unknown_role_is_refused_by_name(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--config", "x.yaml", "--roles", "learner,oracle"])
    assert ended.value.code == 2
    assert "oracle: not one of" in capsys.readouterr().err
