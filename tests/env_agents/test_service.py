"""The service on a MemoryBus: tickets in, one terminal per ticket out, whatever happens."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path

import msgpack
import pytest

from services.env_agents.episodes import Episode
from services.env_agents.player import Player
from services.env_agents.service import serve
from services.env_agents.tasks.frozen_lake import draw_map, map_digest
from shared.runtime.errors import BusUnavailable, ConfigError
from shared.runtime.memory_bus import MemoryBus
from shared.runtime.memory_server import MemoryServer
from shared.wire.codec import decode, encode
from shared.wire.messages import (
    Accepted,
    Behind,
    Heartbeat,
    Partial,
    SampleRequest,
    Terminal,
    Ticket,
)
from shared.wire.telemetry import DeadLetter
from shared.wire.trajectory import Failure, Outcome, Trajectory
from shared.wire.versioning import WIRE_VERSION
from tests.env_agents.rollout_stand_in import (
    SUBJECTS,
    Send,
    StandInRollout,
    eventually,
    fewest_moves,
    issue,
    make_config,
    make_context,
    make_ticket,
    serving,
    settled,
    terminal,
)


async def terminals(bus: MemoryBus) -> list[Terminal]:
    state = await bus.stream_state("terminals")
    if not state.num_messages:
        return []
    async for batch in bus.read("terminals", 1):
        return [decode(record.payload, Terminal) for record in batch]
    raise AssertionError("unreachable")


async def test_every_ticket_is_played_to_one_terminal_and_acknowledged(
    bus: MemoryBus, rollout: StandInRollout
) -> None:
    async with serving(make_context(bus.server), make_config()) as context:
        await issue(bus, *(make_ticket(i, issue_version=3, min_version=0) for i in range(40)))
        await settled(bus)
        assert context.health.ready
    stored = await terminals(bus)
    assert sorted(t.ticket_id for t in stored) == sorted(f"t{i}" for i in range(40))
    for one in stored:
        index = int(one.ticket_id[1:])
        outcome = one.outcome
        assert isinstance(outcome, Trajectory)
        assert (outcome.status, outcome.reward) == ("done", 1.0)
        assert (one.group_id, one.member) == (f"g{index // 8}", index % 8)
        assert (one.purpose, one.issue_version, one.producer) == ("train", 3, "env-0")
        assert outcome.task_digest == map_digest(draw_map("train", 1, index))
        (sequence,) = outcome.sequences
        assert len(sequence.turns) == fewest_moves(index)
        assert {turn.pods for turn in sequence.turns} == {("pod-a",)}
    assert len({t.attempt_id for t in stored}) == 40
    assert context.counters["episodes"] == 40
    assert context.counters["env_steps"] == sum(fewest_moves(i) for i in range(40))
    assert context.gauges["episodes_running"] == 0
    assert context.counters.get("failed_episodes", 0) == 0


async def test_following_turns_go_to_the_pod_that_holds_the_prefix(
    bus: MemoryBus, rollout: StandInRollout
) -> None:
    other = await StandInRollout(bus, "pod-b").start()
    async with serving(make_context(bus.server), make_config()):
        await issue(bus, *(make_ticket(i) for i in range(16)))
        await settled(bus)
    for one in await terminals(bus):
        assert isinstance(one.outcome, Trajectory)
        assert len({turn.pods for turn in one.outcome.sequences[0].turns}) == 1
    assert {t.outcome.sequences[0].turns[0].pods for t in await terminals(bus)} == {  # type: ignore[union-attr]
        ("pod-a",),
        ("pod-b",),
    }
    await other.kill()


async def test_tickets_are_never_pulled_beyond_the_free_places(
    bus: MemoryBus, rollout: StandInRollout
) -> None:
    async def hold(rollout: StandInRollout, request: SampleRequest, send: Send) -> bool:
        await send(Accepted(version=0))
        return True

    rollout.script = hold
    context = make_context(bus.server)
    async with serving(context, make_config(concurrency=3, heartbeat_s=5)):
        await issue(bus, *(make_ticket(i) for i in range(10)))
        await asyncio.sleep(0.2)
        queue = await bus.work_queue("tickets", "env_agents", ack_wait_s=30, max_ack_pending=99)
        assert await queue.pending() == (7, 3)


async def test_a_pod_killed_mid_turn_costs_the_turn_and_not_the_episode(
    bus: MemoryBus, rollout: StandInRollout
) -> None:
    async def die_in_the_second_turn(
        rollout: StandInRollout, request: SampleRequest, send: Send
    ) -> bool:
        await send(Accepted(version=0))
        if len(rollout.requests) < 2:
            await send(rollout.done(request))
        else:
            survivors.append(await StandInRollout(bus, "pod-b", version=1).start())
            asyncio.get_running_loop().call_soon(lambda: doomed.append(kill()))
        return True

    async def kill_now() -> None:
        await rollout.kill()

    def kill() -> asyncio.Task[None]:
        return asyncio.create_task(kill_now())

    survivors: list[StandInRollout] = []
    doomed: list[asyncio.Task[None]] = []
    rollout.script = die_in_the_second_turn
    async with serving(make_context(bus.server), make_config()) as context:
        await issue(bus, make_ticket(0))
        one = await terminal(bus)
        await settled(bus)
    assert isinstance(one.outcome, Trajectory)
    assert one.outcome.reward == 1.0
    turns = one.outcome.sequences[0].turns
    assert [turn.pods for turn in turns] == [("pod-a",)] + [("pod-b",)] * (len(turns) - 1)
    assert context.counters["sample_retries"] == 1
    retried = survivors[0].requests[0]
    lost = rollout.requests[1]
    assert retried.request_id != lost.request_id
    assert retried.token_ids == lost.token_ids
    assert retried.seed == lost.seed


async def test_a_silent_pod_is_told_that_nobody_waits_and_its_late_reply_is_discarded(
    bus: MemoryBus, rollout: StandInRollout
) -> None:
    held: list[tuple[SampleRequest, Send]] = []

    async def late(rollout: StandInRollout, request: SampleRequest, send: Send) -> bool:
        await send(Accepted(version=0))
        if not held:
            held.append((request, send))
            return True
        if len(rollout.requests) == 2:  # late, wrong, and before the true answer
            wrong, send_late = held[0]
            await send_late(rollout.done(wrong))
            await send(rollout.done(request), request_id=wrong.request_id)
        return False

    rollout.script = late
    async with serving(make_context(bus.server), make_config()) as context:
        await issue(bus, make_ticket(0))
        one = await terminal(bus)
        await settled(bus)
    assert isinstance(one.outcome, Trajectory)
    assert len(one.outcome.sequences[0].turns) == fewest_moves(0)
    assert rollout.cancelled == [held[0][0].request_id]
    assert context.counters["sample_retries"] == 1


async def test_heartbeats_keep_a_slow_request_alive(
    bus: MemoryBus, rollout: StandInRollout
) -> None:
    async def slow(rollout: StandInRollout, request: SampleRequest, send: Send) -> bool:
        await send(Accepted(version=0))
        if len(rollout.requests) == 1:
            for _ in range(10):
                await asyncio.sleep(0.02)
                await send(Heartbeat(num_sampled=0))
        await send(rollout.done(request))
        return True

    rollout.script = slow
    async with serving(make_context(bus.server), make_config()) as context:
        await issue(bus, make_ticket(0))
        one = await terminal(bus)
    assert isinstance(one.outcome, Trajectory)
    assert context.counters["sample_retries"] == 0


async def test_duplicate_replies_change_nothing(bus: MemoryBus, rollout: StandInRollout) -> None:
    async def twice(rollout: StandInRollout, request: SampleRequest, send: Send) -> bool:
        for _ in range(3):
            await send(Accepted(version=0))
            await send(rollout.done(request))
        return True

    rollout.script = twice
    async with serving(make_context(bus.server), make_config()):
        await issue(bus, make_ticket(0))
        one = await terminal(bus)
    assert isinstance(one.outcome, Trajectory)
    assert len(one.outcome.sequences[0].turns) == fewest_moves(0)


async def test_interrupted_turns_are_resumed_with_exact_stamps(
    bus: MemoryBus, rollout: StandInRollout
) -> None:
    async def one_token_at_a_time(
        rollout: StandInRollout, request: SampleRequest, send: Send
    ) -> bool:
        await send(Accepted(version=rollout.version))
        rest = rollout.expert(request)
        await send(Partial(sampled=rollout.tokens(rest[:1]), reason="interrupt"))
        rollout.version += 1
        return True

    rollout.script = one_token_at_a_time
    async with serving(make_context(bus.server), make_config()) as context:
        await issue(bus, make_ticket(0))
        one = await terminal(bus)
    assert isinstance(one.outcome, Trajectory)
    assert one.outcome.reward == 1.0
    (sequence,) = one.outcome.sequences
    assert [span.version for span in sequence.spans] == list(range(len(rollout.requests)))
    assert all(span.stop == span.start + 1 for span in sequence.spans)
    answers = sum(turn.stop - turn.start for turn in sequence.turns)
    assert context.counters["resumed_turns"] == answers - len(sequence.turns)


async def test_a_rollout_that_is_behind_is_asked_again_until_it_has_caught_up(
    bus: MemoryBus, rollout: StandInRollout
) -> None:
    async def behind(rollout: StandInRollout, request: SampleRequest, send: Send) -> bool:
        assert request.min_version == 2
        if len(rollout.requests) <= 3:
            await send(Behind(version=len(rollout.requests) - 1))
            return True
        rollout.version = 2
        return False

    rollout.script = behind
    async with serving(make_context(bus.server), make_config()) as context:
        await issue(bus, make_ticket(0, min_version=2))
        one = await terminal(bus)
    assert isinstance(one.outcome, Trajectory)
    assert {span.version for span in one.outcome.sequences[0].spans} == {2}
    assert context.counters["sample_retries"] == 3


async def test_episodes_wait_for_the_first_rollout_to_appear(bus: MemoryBus) -> None:
    async with serving(make_context(bus.server), make_config()):
        await issue(bus, make_ticket(0))
        await asyncio.sleep(0.1)
        late = await StandInRollout(bus, "pod-late").start()
        assert isinstance((await terminal(bus)).outcome, Trajectory)
    await late.kill()


async def test_a_deadline_without_any_rollout_is_a_failed_episode(bus: MemoryBus) -> None:
    async with serving(make_context(bus.server), make_config()) as context:
        await issue(bus, make_ticket(0, deadline=time.time() + 0.15))
        one = await terminal(bus)
        await settled(bus)
    assert isinstance(one.outcome, Failure)
    assert one.outcome.reason == "sample_timeout"
    assert context.counters["failed_episodes"] == 1


async def test_a_ticket_past_its_deadline_is_not_played(
    bus: MemoryBus, rollout: StandInRollout
) -> None:
    async with serving(make_context(bus.server), make_config()):
        await issue(bus, make_ticket(0, deadline=time.time() - 1))
        one = await terminal(bus)
        await settled(bus)
    assert isinstance(one.outcome, Failure)
    assert one.outcome.reason == "deadline"
    assert not rollout.requests


async def test_two_env_agents_leave_one_terminal_per_ticket(
    bus: MemoryBus, rollout: StandInRollout
) -> None:
    first, second = make_context(bus.server, "env-0"), make_context(bus.server, "env-1")
    async with serving(first, make_config()), serving(second, make_config()):
        await issue(bus, *(make_ticket(i) for i in range(40)))
        await settled(bus)
    stored = await terminals(bus)
    assert sorted(t.ticket_id for t in stored) == sorted(f"t{i}" for i in range(40))
    assert {t.producer for t in stored} == {"env-0", "env-1"}


async def test_of_two_players_of_one_ticket_the_first_terminal_stands_and_both_acknowledge(
    bus: MemoryBus, rollout: StandInRollout
) -> None:
    async def hold_the_slow_one(
        rollout: StandInRollout, request: SampleRequest, send: Send
    ) -> bool:
        if request.request_id.startswith("env-slow") and not held:
            held.append((request, send))
            return True
        return False

    held: list[tuple[SampleRequest, Send]] = []
    rollout.script = hold_the_slow_one
    slow, fast = make_context(bus.server, "env-slow"), make_context(bus.server, "env-fast")
    async with serving(slow, make_config(concurrency=1, heartbeat_s=5)):
        await issue(bus, make_ticket(0))
        await eventually(lambda: held)
        pending = bus.server.streams[SUBJECTS.stream("tickets")].consumers["env_agents"].pending
        pending[1].due = 0.0  # as if the slow one had said nothing for ack_wait
        async with serving(fast, make_config()):
            one = await terminal(bus)
            await settled(bus)
        request, send = held[0]
        await send(rollout.done(request))
        await eventually(lambda: slow.counters.get("adopted_terminals"))
    assert one.producer == "env-fast"
    assert await terminals(bus) == [one]
    assert "episodes" not in slow.counters
    assert fast.counters["episodes"] == 1


async def test_a_redelivered_ticket_whose_terminal_is_stored_is_only_acknowledged(
    bus: MemoryBus, rollout: StandInRollout
) -> None:
    await issue(bus, make_ticket(0))
    queue = await bus.work_queue("tickets", "env_agents", ack_wait_s=30, max_ack_pending=99)
    (job,) = await queue.next(1, 1.0)
    async with serving(make_context(bus.server), make_config(max_attempts=1)):
        stored = Terminal(
            ticket_id="t0",
            attempt_id="dead-env",
            purpose="train",
            group_id="g0",
            member=0,
            issue_version=0,
            producer="env-dead",
            outcome=Failure(reason="env_error"),
        )
        await bus.append(SUBJECTS.terminal("t0"), encode(stored))
        await job.nak()
        await settled(bus)
    assert await terminal(bus) == stored
    assert not rollout.requests


async def test_a_ticket_delivered_too_often_ends_as_failed(
    bus: MemoryBus, rollout: StandInRollout
) -> None:
    await issue(bus, make_ticket(0))
    queue = await bus.work_queue("tickets", "env_agents", ack_wait_s=30, max_ack_pending=99)
    for _ in range(2):
        (job,) = await queue.next(1, 1.0)
        await job.nak()
    async with serving(make_context(bus.server), make_config(max_attempts=2)):
        one = await terminal(bus)
        await settled(bus)
    assert isinstance(one.outcome, Failure)
    assert one.outcome.reason == "max_deliver"
    assert not rollout.requests


async def test_a_malformed_ticket_is_dead_lettered_and_the_next_one_is_played(
    bus: MemoryBus, rollout: StandInRollout
) -> None:
    async with serving(make_context(bus.server), make_config()):
        await bus.append(SUBJECTS.ticket("bad"), b"\x93not a ticket")
        await issue(bus, make_ticket(0))
        assert isinstance((await terminal(bus)).outcome, Trajectory)
        await settled(bus)
    record = await bus.last(SUBJECTS.dead("env_agents"))
    assert record is not None
    letter = decode(record.payload, DeadLetter)
    assert letter.origin == SUBJECTS.ticket("bad")
    assert letter.payload == b"\x93not a ticket"
    assert await bus.last(SUBJECTS.terminal("bad")) is None


async def test_a_ticket_of_another_wire_major_is_handed_back_and_shows_in_readiness(
    bus: MemoryBus, rollout: StandInRollout
) -> None:
    async with serving(make_context(bus.server), make_config()) as context:
        foreign = msgpack.packb({"w": [99, 0], "t": "Ticket", "b": {}})
        await bus.append(SUBJECTS.ticket("newer"), foreign)
        await eventually(lambda: ".".join(map(str, WIRE_VERSION)) in context.health.reason)
        tickets = bus.server.streams[SUBJECTS.stream("tickets")]
        assert len(tickets.records) == 1, "kept for somebody who can read it"
        assert await bus.last(SUBJECTS.dead("env_agents")) is None
        await issue(bus, make_ticket(0))
        await terminal(bus)
        assert context.health.ready


async def test_a_stop_hands_running_episodes_to_another_env_agent(
    bus: MemoryBus, rollout: StandInRollout
) -> None:
    async def hold(rollout: StandInRollout, request: SampleRequest, send: Send) -> bool:
        await send(Accepted(version=0))
        return True

    rollout.script = hold
    first = make_context(bus.server, "env-0")
    async with serving(first, make_config(heartbeat_s=5)):
        await issue(bus, *(make_ticket(i) for i in range(3)))
        await eventually(lambda: len(rollout.requests) == 3)
        stopped_at = time.monotonic()
    assert time.monotonic() - stopped_at < 1.0
    assert first.counters["abandoned_episodes"] == 3
    assert await terminals(bus) == []
    await asyncio.sleep(0.01)
    assert sorted(rollout.cancelled) == sorted(r.request_id for r in rollout.requests)

    rollout.script = None
    async with serving(make_context(bus.server, "env-1"), make_config()):
        await settled(bus)
    stored = await terminals(bus)
    assert {t.producer for t in stored} == {"env-1"}
    assert len(stored) == 3


async def test_tickets_in_play_are_kept_from_redelivery(
    bus: MemoryBus, rollout: StandInRollout
) -> None:
    async def slow(rollout: StandInRollout, request: SampleRequest, send: Send) -> bool:
        if len(rollout.requests) == 1:
            await asyncio.sleep(0.5)
        return False

    rollout.script = slow
    async with serving(make_context(bus.server), make_config(ack_wait_s=0.15, heartbeat_s=5)):
        await issue(bus, make_ticket(0))
        await terminal(bus)
        await settled(bus)
    first_turns = [r for r in rollout.requests if r.request_id.endswith("-1")]
    assert len(first_turns) == 1, "played once"


USER_ENVIRONMENT = """
import asyncio
from services.env_agents.environment import Observation, StepResult

class Guess:
    closed = []
    def __init__(self, options):
        self.mode = options["mode"]
    async def reset(self, task):
        if self.mode == "reset_raises":
            raise RuntimeError("no such task")
        if self.mode == "cancelled":
            raise TimeoutError("the tool's own")
        return Observation("SFFF\\nFFFF\\nFFFF\\nFFFG\\n@32>")
    async def step(self, answer):
        if self.mode == "step_raises":
            raise RuntimeError("boom " + "x" * 2000)
        if self.mode == "hangs":
            await asyncio.sleep(3600)
        if self.mode == "nan":
            return StepResult(Observation("@32>"), reward=float("nan"))
        if self.mode == "wrong_type":
            return ("@32>", 1.0)
        if self.mode == "unknown_text":
            return StepResult(Observation("\\u00e9"))
        return StepResult(Observation(""), 0.5, terminated=True, rewards={"style": 0.25})
    def task_digest(self):
        return "guess"
    async def close(self):
        Guess.closed.append(self.mode)
        if self.mode == "close_raises":
            raise RuntimeError("stuck")
"""


@pytest.fixture
def user_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "users_own_env.py").write_text(USER_ENVIRONMENT)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "users_own_env", raising=False)
    return "users_own_env:Guess"


@pytest.mark.parametrize("mode", ["good", "close_raises"])
async def test_a_users_environment_from_outside_the_repository_is_played(
    bus: MemoryBus, rollout: StandInRollout, user_environment: str, mode: str
) -> None:
    task = {"environment": user_environment, "options": {"mode": mode}}
    async with serving(make_context(bus.server), make_config(task=task)):
        await issue(bus, make_ticket(0))
        one = await terminal(bus)
    assert isinstance(one.outcome, Trajectory)
    assert (one.outcome.reward, one.outcome.rewards) == (0.5, {"style": 0.25})
    assert one.outcome.task_digest == "guess"
    assert sys.modules["users_own_env"].Guess.closed == [mode]


@pytest.mark.parametrize(
    ("mode", "reason", "detail"),
    [
        ("reset_raises", "env_error", "reset: RuntimeError: no such task"),
        ("cancelled", "env_error", "reset: TimeoutError: the tool's own"),
        ("step_raises", "env_error", "step: RuntimeError: boom"),
        ("nan", "env_error", "step: ValueError: reward is not finite"),
        ("wrong_type", "env_error", "returned tuple, not StepResult"),
        ("unknown_text", "env_error", "cannot be tokenised"),
        ("hangs", "env_timeout", "step took longer than env_timeout_s (0.1 s)"),
    ],
)
async def test_an_environment_that_raises_or_hangs_is_a_failed_episode_with_its_reason(
    bus: MemoryBus,
    rollout: StandInRollout,
    user_environment: str,
    mode: str,
    reason: str,
    detail: str,
) -> None:
    task = {"environment": user_environment, "options": {"mode": mode}}
    config = make_config(task=task, env_timeout_s=0.1)
    async with serving(make_context(bus.server), config) as context:
        await issue(bus, make_ticket(0))
        one = await terminal(bus)
        await settled(bus)
    assert isinstance(one.outcome, Failure)
    assert one.outcome.reason == reason
    assert detail in one.outcome.detail
    assert len(one.outcome.detail) <= 500
    assert context.counters["failed_episodes"] == 1
    assert sys.modules["users_own_env"].Guess.closed == [mode], "closed all the same"


async def test_an_environment_that_cannot_be_used_stops_the_service_at_start(
    bus: MemoryBus, user_environment: str
) -> None:
    config = make_config(task={"environment": user_environment})
    with pytest.raises(ConfigError, match="users_own_env:Guess: refuses"):
        await serve(make_context(bus.server), config)


async def test_a_run_that_nobody_created_is_reported_within_the_bound() -> None:
    with pytest.raises(BusUnavailable, match="is the learner running"):
        await serve(make_context(MemoryServer()), make_config(streams_timeout_s=0.05))


async def test_a_fault_of_our_own_in_one_episode_leaves_the_others_playing(
    bus: MemoryBus, rollout: StandInRollout, monkeypatch: pytest.MonkeyPatch
) -> None:
    play = Player.play

    async def broken(self: Player, ticket: Ticket, episode: Episode) -> Outcome:
        if ticket.ticket_id == "t2" and not broken_once:
            broken_once.append(ticket)
            raise KeyError("a bug")
        return await play(self, ticket, episode)

    broken_once: list[Ticket] = []
    monkeypatch.setattr(Player, "play", broken)
    async with serving(make_context(bus.server), make_config()) as context:
        await issue(bus, *(make_ticket(i) for i in range(4)))
        await settled(bus)
    assert context.counters["internal_errors"] == 1
    stored = await terminals(bus)
    assert [t.ticket_id for t in stored][-1] == "t2", "handed back and played again"
    assert all(isinstance(t.outcome, Trajectory) for t in stored)
    assert len(stored) == 4
