"""The decisions around vLLM on a simulated server: stamps in every mode, deaths at every call."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from random import Random
from typing import Any

import numpy as np
import pytest
import torch

from services.rollout import vllm_engine
from services.rollout.engine import EngineDead, SampleResult, SampleSpec
from services.rollout.vllm_engine import VllmEngine
from services.rollout.vllm_port import Output, Recorded, Sync
from tests.rollout.engines import ids_of, make_spec, stamps_of
from tests.rollout.simulated_server import SimulatedServer

STATE = {"w": torch.zeros(3)}
SHAPES = {"w": (3,)}


@asynccontextmanager
async def running(seed: int = 0, **sync: Any) -> AsyncIterator[tuple[VllmEngine, SimulatedServer]]:
    server = SimulatedServer(seed, SHAPES)
    engine = VllmEngine(server, dtype=torch.float32, context_tokens=96, sync=Sync(**sync))
    await engine.start()
    try:
        async with asyncio.timeout(250):
            yield engine, server
    finally:
        await engine.close()


def wrong_stamps(result: SampleResult) -> int:
    """Tokens whose stamp is not the label they were really sampled under."""
    sampled_under = (-result.sampled.logprobs.numpy()).astype(int)
    return int((sampled_under != np.array(stamps_of(result), dtype=int)).sum())


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("sync", "num_updates"),
    [
        ({"mode": "keep"}, 3000),
        ({"mode": "keep", "keep_kv": True}, 3000),
        ({"mode": "interrupt"}, 3000),
        ({"mode": "wait", "wait_s": 5}, 1000),
    ],
    ids=["keep", "keep_kv", "interrupt", "wait"],
)
async def test_no_stamp_is_wrong_in_ten_thousand_updates_at_random_moments(
    sync: dict[str, Any], num_updates: int
) -> None:
    random = Random(7)
    wrong = mixed_unmarked = num_tokens = num_crossed = turns = 0
    stop = False

    async def play(engine: VllmEngine, server: SimulatedServer, name: str) -> None:
        nonlocal wrong, mixed_unmarked, num_tokens, num_crossed, turns
        while not stop:
            turns += 1
            spec = make_spec(f"{name}.{turns}", (1, 2), new=random.randrange(1, 12))
            result = await engine.sample(spec)
            wrong += wrong_stamps(result)
            num_tokens += len(ids_of(result))
            versions = set(stamps_of(result))
            num_crossed += len(versions) > 1
            if result.finish != "interrupted":
                assert len(ids_of(result)) == spec.max_new_tokens
            if len(versions) > 1 and sync.get("keep_kv"):
                mixed_unmarked += not result.sampled.mixed_kv
            elif not sync.get("keep_kv"):
                assert not result.sampled.mixed_kv

    async with running(**sync) as (engine, server):
        async with asyncio.TaskGroup() as group:
            for number in range(6):
                group.create_task(play(engine, server, f"p{number}"))
            for version in range(num_updates):
                await engine.update(version, STATE, None)
                for _ in range(random.randrange(6)):
                    await asyncio.sleep(0)
                if random.random() < 0.2:
                    engine.interrupt()
            stop = True
        assert wrong == mixed_unmarked == 0
        assert num_tokens > num_updates
        assert (num_crossed > 0) == (sync["mode"] == "keep")
        # Keys and values of older weights are there only where that was asked for.
        assert any(len(answer.kv) > 1 for answer in server.answers) == bool(sync.get("keep_kv"))


async def test_the_count_of_wrong_stamps_sees_one() -> None:
    async with running() as (engine, _):
        await engine.update(3, STATE, None)
        result = await engine.sample(make_spec("r", (1, 2)))
        assert wrong_stamps(result) == 0
        shifted = result.sampled.model_copy(
            update={"spans": (result.sampled.spans[0].model_copy(update={"version": 4}),)}
        )
        assert wrong_stamps(SampleResult(shifted, "length")) == 6


async def test_keep_goes_on_interrupt_ends_and_wait_lets_end() -> None:
    for mode, finish, stamps in (
        ("keep", "length", [0] * 3 + [1] * 3),
        ("interrupt", "interrupted", [0] * 3),
        ("wait", "length", [0] * 6),
    ):
        async with running(mode=mode) as (engine, server):
            await engine.update(0, STATE, None)
            async with asyncio.TaskGroup() as group:
                answer = group.create_task(engine.sample(make_spec("r", (1, 2))))
                while engine.num_sampled("r") < 3:  # noqa: ASYNC110
                    await asyncio.sleep(0)
                server.held = mode != "wait"
                update = group.create_task(engine.update(1, STATE, None))
                await update
                server.held = False
            assert (answer.result().finish, stamps_of(answer.result())) == (finish, stamps)


async def test_wait_interrupts_what_does_not_end_within_its_bound() -> None:
    async with running(mode="wait", wait_s=0.05) as (engine, server):
        await engine.update(0, STATE, None)
        server.held = True
        async with asyncio.TaskGroup() as group:
            answer = group.create_task(engine.sample(make_spec("r", (1, 2))))
            await asyncio.sleep(0.01)
            await engine.update(1, STATE, None)
        assert answer.result().finish == "interrupted"
        assert engine.version == 1


async def test_a_turn_that_comes_during_a_swap_starts_under_the_new_version() -> None:
    async with running() as (engine, server):
        await engine.update(0, STATE, None)
        async with asyncio.TaskGroup() as group:
            update = group.create_task(engine.update(1, STATE, None))
            while engine.version >= 0:  # noqa: ASYNC110
                await asyncio.sleep(0)
            answer = group.create_task(engine.sample(make_spec("r", (1, 2))))
            await update
        assert stamps_of(answer.result()) == [1] * 6
        assert server.answers[-1].salt == "1"


@pytest.mark.parametrize("call", ["write", "pause", "swap", "resume"])
@pytest.mark.parametrize("how", ["die_in", "hang_in"])
async def test_an_engine_lost_during_a_swap_is_dead_and_nobody_hangs(call: str, how: str) -> None:
    async with running(swap_timeout_s=0.2) as (engine, server):
        await engine.update(0, STATE, None)
        server.held = True
        async with asyncio.TaskGroup() as group:
            running_turn = group.create_task(_death(engine.sample(make_spec("running", (1, 2)))))
            await asyncio.sleep(0.01)
            setattr(server, how, call)
            with pytest.raises(EngineDead):
                await engine.update(1, STATE, None)
            held = group.create_task(_death(engine.sample(make_spec("held", (1, 2)))))
        assert "version 1" in engine.failure or "no answer" in engine.failure
        assert running_turn.result() == held.result() == engine.failure
        assert engine.version == -1
        with pytest.raises(EngineDead):
            await engine.update(2, STATE, None)


async def _death(call: Any) -> str:
    with pytest.raises(EngineDead) as caught:
        await call
    return str(caught.value)


async def test_a_death_while_idle_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_engine, "WATCH_S", 0.01)
    async with running() as (engine, server):
        await engine.update(0, STATE, None)
        server.dead = "killed"
        await asyncio.sleep(0.1)
        assert engine.failure == "killed"
        assert engine.version == -1


async def test_an_engine_that_does_not_start_says_so() -> None:
    server = SimulatedServer(0, SHAPES)
    server.die_in = "start"
    engine = VllmEngine(server, dtype=torch.float32, context_tokens=96, sync=Sync())
    with pytest.raises(EngineDead, match="vLLM did not start: RuntimeError: killed in start"):
        await engine.start()
    await engine.close()


async def test_a_logprob_that_is_not_a_number_kills_the_engine_with_its_version() -> None:
    async with running() as (engine, server):
        server.nan_under = "1"
        await engine.update(0, STATE, None)
        await engine.sample(make_spec("good", (1, 2)))
        await engine.update(1, STATE, None)
        with pytest.raises(EngineDead, match="logits of version 1 are not finite"):
            await engine.sample(make_spec("bad", (1, 2)))


async def test_a_caller_that_goes_away_does_not_read_as_a_death() -> None:
    async with running() as (engine, server):
        await engine.update(0, STATE, None)
        server.held = True
        task = asyncio.ensure_future(engine.sample(make_spec("r", (1, 2))))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not server.running
        assert engine.load().running == 0
        assert not engine.failure


async def test_a_request_id_in_use_is_refused() -> None:
    async with running() as (engine, server):
        await engine.update(0, STATE, None)
        server.held = True
        first = asyncio.ensure_future(engine.sample(make_spec("r", (1, 2))))
        await asyncio.sleep(0.01)
        with pytest.raises(ValueError, match="'r' is being sampled already"):
            await engine.sample(make_spec("r", (1, 2)))
        engine.interrupt("r")
        assert (await first).finish == "interrupted"


async def test_scores_are_rows_of_the_lengths_given() -> None:
    async with running() as (engine, _):
        await engine.update(2, STATE, None)
        scored = await engine.score([np.array([1, 2, 3]), np.array([4])])
        assert [row.tolist() for row in scored] == [[0.0, -2.0, -2.0], [0.0]]
        assert await engine.score([]) == []


class RecordingServer(SimulatedServer):
    """Its model has one layer with experts; token t of a request took expert t."""

    async def generate(self, spec: SampleSpec, salt: str) -> Output:
        output = await super().generate(spec, salt)
        num_tokens = len(spec.token_ids) + len(output.token_ids)
        rows = np.arange(num_tokens, dtype=np.uint8).reshape(-1, 1, 1)
        routing = [Recorded(label, 0, rows) for label, _, _ in output.labels]
        return replace(output, routing=routing)


async def test_recorded_routing_is_sent_by_version_without_what_the_caller_holds() -> None:
    server = RecordingServer(0, SHAPES)
    engine = VllmEngine(server, dtype=torch.float32, context_tokens=96, sync=Sync())
    await engine.start()
    await engine.update(4, STATE, None)
    prefix = range(10)
    first = await engine.sample(make_spec("r", prefix, new=5))
    held = await engine.sample(make_spec("s", prefix, new=5, routing_held=(4, 8)))
    other = await engine.sample(make_spec("t", prefix, new=5, routing_held=(3, 8)))
    await engine.close()
    for result, start in ((first, 0), (held, 8), (other, 0)):
        (record,) = result.sampled.routing
        num_context = 10 + len(ids_of(result)) - 1
        assert (record.version, record.start, record.stop) == (4, start, num_context)
        assert record.experts.numpy()[:, 0, 0].tolist() == list(range(start, num_context))
