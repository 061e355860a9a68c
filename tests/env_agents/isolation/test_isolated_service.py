"""The whole service with misbehaving environments: each costs its episode, by name, and no more."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from shared.runtime.errors import ConfigError
from shared.runtime.memory_bus import MemoryBus
from shared.wire.messages import Accepted, Done, SampleRequest, TaskRef, Ticket
from shared.wire.trajectory import Failure, Trajectory
from tests.env_agents.isolation.isolated_world import PATH
from tests.env_agents.rollout_stand_in import (
    Send,
    StandInRollout,
    issue,
    make_config,
    make_context,
    make_ticket,
    serving,
    terminal,
)

FAULTS = {
    "hang": ("env_timeout", "step took longer than env_timeout_s"),
    "hang in reset": ("env_timeout", "reset took longer than env_timeout_s"),
    "leak": ("env_error", "MemoryError"),
    "fork": ("env_lost", "more than isolation.processes"),
    "raise": ("env_error", "ZeroDivisionError: as asked"),
    "die": ("env_lost", "exited with status 7"),
    "crash": ("env_lost", "SIGSEGV"),
    "lose its server": ("env_lost", "step: server 7 hung up"),
}


async def answer_left(rollout: StandInRollout, request: SampleRequest, send: Send) -> bool:
    await send(Accepted(version=0))
    await send(Done(sampled=rollout.tokens([13, 0]), finish="stop"))
    return True


def ticket(index: int, do: str) -> Ticket:
    task = TaskRef(dataset="d", split="train", index=index, seed=1, payload={"do": do})
    return make_ticket(index, task=task)


async def test_every_fault_costs_its_episode_and_all_others_are_played(
    bus: MemoryBus, rollout: StandInRollout
) -> None:
    rollout.script = answer_left
    config = make_config(
        concurrency=32,
        env_timeout_s=3.0,
        isolation={"mode": "process", "memory_mb": 64},
        task={"environment": PATH},
    )
    deeds = [*FAULTS, *[""] * 20]
    async with serving(make_context(bus.server), config) as context:
        await issue(bus, *(ticket(i, do) for i, do in enumerate(deeds)))
        ends = [await terminal(bus, f"t{i}", timeout_s=30) for i in range(len(deeds))]
        assert context.health.ready
    for do, end in zip(deeds, ends, strict=True):
        if do:
            reason, detail = FAULTS[do]
            assert isinstance(end.outcome, Failure)
            assert (do, end.outcome.reason) == (do, reason)
            assert detail in end.outcome.detail
        else:
            assert isinstance(end.outcome, Trajectory)
            assert end.outcome.reward == 1.0
    assert context.counters["failed_episodes"] == len(FAULTS)
    assert context.counters.get("internal_errors", 0) == 0


async def test_an_environment_that_cannot_be_used_stops_the_service_at_start(
    bus: MemoryBus, tmp_path: Path
) -> None:
    config = make_config(
        isolation={"mode": "process"}, task={"environment": "no_such_module_here:X"}
    )
    with pytest.raises(ExceptionGroup) as caught:
        async with serving(make_context(bus.server), config):
            await asyncio.sleep(30)
    assert caught.group_contains(ConfigError, match="PYTHONPATH")
