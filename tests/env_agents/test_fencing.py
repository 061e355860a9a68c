"""The env agents' side of the fence: nobody samples the old version after the acknowledgement."""

from __future__ import annotations

import asyncio
import time

import pytest

from services.env_agents.config import EnvAgentsConfig
from shared.runtime.context import Context
from shared.runtime.memory_bus import MemoryBus
from shared.wire.codec import decode, encode
from shared.wire.fencing import PartialTrajectory
from shared.wire.messages import Accepted, Heartbeat, Partial, SampleRequest
from shared.wire.trajectory import Trajectory
from shared.wire.weights import Control
from tests.env_agents.rollout_stand_in import (
    SUBJECTS,
    Send,
    StandInRollout,
    eventually,
    issue,
    make_config,
    make_context,
    make_ticket,
    serving,
    settled,
    terminal,
)


def fenced_config(**env_agents: object) -> EnvAgentsConfig:
    config = make_config(**env_agents)
    section = config.old_logprobs.model_copy(update={"route": "interrupt"})
    return config.model_copy(update={"old_logprobs": section})


async def announce(
    bus: MemoryBus, generation: int, min_version: int, head: int, *, nudge: bool = True
) -> None:
    control = encode(
        Control(
            phase="running",
            head_version=head,
            oldest_needed=0,
            generation=generation,
            min_version=min_version,
            updated_at=time.time(),
        )
    )
    await bus.put_control("control", control)
    if nudge:
        await bus.publish(bus.subjects.control, control)


async def partials(bus: MemoryBus) -> list[PartialTrajectory]:
    last = (await bus.stream_state("partials")).last_seq
    records = [await bus.get("partials", seq) for seq in range(1, last + 1)]
    return [decode(record.payload, PartialTrajectory) for record in records if record]


def acknowledged(context: Context) -> float:
    return context.gauges.get("fence_generation", -1)


class Slow:
    """Gives the first token at once and the rest when it is cancelled or `release` is set."""

    def __init__(self, *, answers_cancel: bool = True) -> None:
        self.release = asyncio.Event()
        self.answers_cancel = answers_cancel
        self.held: list[SampleRequest] = []

    async def __call__(self, rollout: StandInRollout, request: SampleRequest, send: Send) -> bool:
        if self.release.is_set():
            return False
        self.held.append(request)
        await send(Accepted(version=rollout.version))
        self._task = asyncio.create_task(self._hold(rollout, request, send))
        return True

    async def _hold(self, rollout: StandInRollout, request: SampleRequest, send: Send) -> None:
        version_then = rollout.tokens(rollout.expert(request)[:1])
        while request.request_id not in rollout.cancelled or not self.answers_cancel:
            if self.release.is_set():
                await send(rollout.done(request))
                return
            await send(Heartbeat(num_sampled=1))
            await asyncio.sleep(0.005)
        await send(Partial(sampled=version_then, reason="cancelled"))


async def test_a_generation_interrupts_hands_in_acknowledges_and_waits_for_the_next_version(
    bus: MemoryBus, rollout: StandInRollout
) -> None:
    slow = Slow()
    rollout.script = slow
    async with serving(make_context(bus.server), fenced_config()) as context:
        await issue(bus, make_ticket(0), make_ticket(1), make_ticket(2, purpose="eval"))
        await eventually(lambda: len(slow.held) == 3)
        assert acknowledged(context) == 0
        await announce(bus, 1, min_version=1, head=0)
        await eventually(lambda: acknowledged(context) == 1)
        handed_in = await partials(bus)
        slow.release.set()
        await asyncio.sleep(0.1)
        assert len(rollout.requests) == 3, "nothing is asked for before the version is there"
        rollout.version = 1
        await announce(bus, 1, min_version=1, head=1)
        one = await terminal(bus, "t0")
        await settled(bus)
        assert context.counters["interrupted_turns"] == 3
        assert context.gauges["fence_interrupted"] == 3
    assert sorted(p.ticket_id for p in handed_in) == ["t0", "t1"], "evaluation is never trained"
    assert {(p.generation, p.producer, p.incarnation) for p in handed_in} == {(1, "env-0", "i")}
    [partial] = [p for p in handed_in if p.ticket_id == "t0"]
    assert partial.attempt_id == one.attempt_id
    assert isinstance(one.outcome, Trajectory)
    [before], [after] = partial.sequences, one.outcome.sequences
    length = before.token_ids.shape[0]
    assert after.token_ids.numpy()[:length].tolist() == before.token_ids.numpy().tolist()
    assert [span.version for span in before.spans] == [0]
    assert (after.spans[0].stop, after.spans[0].version) == (length, 0)
    assert {span.version for span in after.spans[1:]} == {1}
    assert {r.min_version for r in rollout.requests[3:]} == {1}


async def test_the_floor_is_known_before_the_first_request(
    bus: MemoryBus, rollout: StandInRollout
) -> None:
    await announce(bus, 4, min_version=3, head=2)
    await issue(bus, make_ticket(0))
    async with serving(make_context(bus.server), fenced_config()) as context:
        await eventually(lambda: acknowledged(context) == 4)
        await asyncio.sleep(0.1)
        assert rollout.requests == []
        rollout.version = 3
        await announce(bus, 4, min_version=3, head=3)
        await settled(bus)
    assert {request.min_version for request in rollout.requests} == {3}


async def test_a_lost_word_costs_one_poll(bus: MemoryBus, rollout: StandInRollout) -> None:
    async with serving(make_context(bus.server), fenced_config()) as context:
        await announce(bus, 1, min_version=1, head=0, nudge=False)
        await eventually(lambda: acknowledged(context) == 1, 1.0)


async def test_a_generation_is_acknowledged_once_and_an_older_document_changes_nothing(
    bus: MemoryBus, rollout: StandInRollout
) -> None:
    slow = Slow()
    rollout.script = slow
    async with serving(make_context(bus.server), fenced_config()) as context:
        await issue(bus, make_ticket(0))
        await eventually(lambda: slow.held)
        for _ in range(3):
            await announce(bus, 2, min_version=1, head=0)
        await eventually(lambda: acknowledged(context) == 2)
        await announce(bus, 1, min_version=0, head=0)
        await announce(bus, 3, min_version=1, head=0)
        await eventually(lambda: acknowledged(context) == 3)
        assert len(await partials(bus)) == 1, "what is handed in is not handed in again"
        assert len(rollout.requests) == 1
        slow.release.set()
        rollout.version = 1
        await announce(bus, 3, min_version=1, head=1)
        await settled(bus)


async def test_a_floor_that_is_lowered_lets_requests_go_on(
    bus: MemoryBus, rollout: StandInRollout
) -> None:
    await announce(bus, 1, min_version=1, head=0)
    await issue(bus, make_ticket(0))
    async with serving(make_context(bus.server), fenced_config()):
        await asyncio.sleep(0.05)
        assert rollout.requests == []
        await announce(bus, 2, min_version=0, head=0)
        await settled(bus)


@pytest.mark.parametrize("late", ["after the bound", "below the floor"])
async def test_tokens_of_the_old_version_that_come_too_late_are_not_taken(
    bus: MemoryBus, rollout: StandInRollout, late: str
) -> None:
    slow = Slow(answers_cancel=False)
    if late == "after the bound":
        rollout.script = slow
    async with serving(make_context(bus.server), fenced_config(heartbeat_s=0.05)) as context:
        if late == "after the bound":
            await issue(bus, make_ticket(0))
            await eventually(lambda: slow.held)
        await announce(bus, 1, min_version=1, head=0)
        await eventually(lambda: acknowledged(context) == 1)
        if late == "after the bound":
            assert context.counters["interruptions_unanswered"] == 1
            slow.release.set()
            rollout.version = 1
        else:
            await issue(bus, make_ticket(0))
            asyncio.get_running_loop().call_later(0.2, setattr, rollout, "version", 1)
        await announce(bus, 1, min_version=1, head=1)
        one = await terminal(bus)
        await settled(bus)
    assert await partials(bus) == []
    assert isinstance(one.outcome, Trajectory)
    assert {span.version for span in one.outcome.sequences[0].spans} == {1}
    assert context.counters["sample_retries"] > 0


async def test_what_is_finished_and_not_yet_stored_is_handed_in_too(
    bus: MemoryBus, rollout: StandInRollout
) -> None:
    """Its terminal may reach the learner after the version is left."""
    context = make_context(bus.server)
    append = context.bus.append
    storing, go_on = asyncio.Event(), asyncio.Event()

    async def held(subject: str, payload: bytes, **options: object) -> int:
        if subject == SUBJECTS.terminal("t0"):
            storing.set()
            await go_on.wait()
        return await append(subject, payload, **options)  # type: ignore[arg-type]

    context.bus.append = held  # type: ignore[method-assign]
    async with serving(context, fenced_config()):
        await issue(bus, make_ticket(0))
        await storing.wait()
        await announce(bus, 1, min_version=1, head=0)
        await eventually(lambda: acknowledged(context) == 1)
        [partial] = await partials(bus)
        go_on.set()
        one = await terminal(bus)
        await settled(bus)
    assert isinstance(one.outcome, Trajectory)
    assert partial.sequences == one.outcome.sequences


async def test_other_routes_know_no_fence(bus: MemoryBus, rollout: StandInRollout) -> None:
    async with serving(make_context(bus.server), make_config()) as context:
        await announce(bus, 1, min_version=9, head=0)
        await issue(bus, make_ticket(0))
        await settled(bus)
    assert acknowledged(context) == -1
    assert {request.min_version for request in rollout.requests} == {0}
    assert await partials(bus) == []
