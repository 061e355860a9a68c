"""The service around `VllmEngine`, on a simulated server: swaps that take time, stops, deaths."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import torch

from services.rollout.config import RolloutConfig
from services.rollout.vllm_engine import VllmEngine
from services.rollout.vllm_options import published_shapes
from services.rollout.vllm_port import Sync
from tests.rollout.pods import World, eventually, make_request
from tests.rollout.simulated_server import SimulatedServer


@pytest.fixture
async def world(untied_dir: Path) -> AsyncIterator[World]:
    world = World(untied_dir, per_token=-1.0)  # what the simulated server says
    await world.publish_seed(0)
    yield world
    await world.bus.close()


class Servers:
    """Makes engines, and keeps the servers under them."""

    def __init__(self, model_dir: Path, **sync: Any) -> None:
        self._shapes = published_shapes(json.loads((model_dir / "config.json").read_text()))
        self._sync = Sync(**sync)
        self.made: list[SimulatedServer] = []

    def __call__(self, _: RolloutConfig) -> VllmEngine:
        server = SimulatedServer(len(self.made), self._shapes)
        server.vocab_size = 29
        self.made.append(server)
        return VllmEngine(server, dtype=torch.float32, context_tokens=96, sync=self._sync)


async def test_a_request_that_comes_while_its_version_is_written_waits_for_it(
    world: World,
) -> None:
    make = Servers(world.model_dir)
    async with world.pod(make=make, behind_wait_s=0.01) as context:
        make.made[0].swap_s = 0.5
        publishing = asyncio.ensure_future(world.publish_seed(1))
        await eventually(lambda: make.made[0].swapping)
        body = await world.answer(make_request(min_version=1))
        assert body.kind == "done"
        assert {span.version for span in body.sampled.spans} == {1}
        # One beyond it is behind: nobody knows when that will come.
        assert (await world.answer(make_request("later", min_version=2))).kind == "behind"
        await publishing
        assert context.health.ready


async def test_an_interrupting_update_answers_with_partials_that_can_be_resumed(
    world: World,
) -> None:
    make = Servers(world.model_dir, mode="interrupt")
    async with world.pod(make=make) as context:
        make.made[0].limit = 7
        for i in range(5):
            await world.ask(make_request(f"r{i}", new=30))
        await eventually(lambda: len(make.made[0].running) == 5)
        await world.publish_seed(1)
        bodies = [await world.final(f"r{i}") for i in range(5)]
        assert {(body.kind, body.reason) for body in bodies} == {("partial", "interrupt")}
        make.made[0].limit = 100
        for i, body in enumerate(bodies):
            part = body.sampled.token_ids.numpy().tolist()
            rest = await world.answer(
                make_request(
                    f"rest{i}", (1, 2, 3, *part), new=30 - len(part), seed_offset=len(part)
                )
            )
            assert {span.version for span in rest.sampled.spans} == {1}
            assert len(part) + rest.sampled.token_ids.shape[0] == 30
        assert context.counters["interrupted_turns"] == 5


@pytest.mark.parametrize("call", ["write", "pause", "swap", "resume"])
async def test_an_engine_that_dies_in_a_swap_is_rebuilt_and_no_request_hangs(
    world: World, call: str
) -> None:
    make = Servers(world.model_dir)
    async with world.pod(make=make, heartbeat_s=0.02) as context:
        make.made[0].limit = 7
        for i in range(4):
            await world.ask(make_request(f"r{i}", new=60))
        await eventually(lambda: len(make.made[0].running) == 4)
        make.made[0].die_in = call
        await world.publish_seed(1)
        for i in range(4):
            body = await world.final(f"r{i}")
            assert (body.kind, body.retryable) == ("refused", True)
        await eventually(lambda: context.version == 1 and context.health.ready)
        assert len(make.made) == 2
        assert (await world.answer(make_request("after"))).kind == "done"


async def test_a_stopped_pod_hands_back_what_it_has_within_its_bound(world: World) -> None:
    make = Servers(world.model_dir)
    async with world.pod(make=make, drain_s=2.0) as context:
        make.made[0].limit = 7
        for i in range(6):
            await world.ask(make_request(f"r{i}", new=80))
        await eventually(lambda: len(make.made[0].running) == 6)
        context.stop.set()
        bodies = [await world.final(f"r{i}") for i in range(6)]
        assert {(body.kind, body.reason) for body in bodies} == {("partial", "drain")}
    assert make.made[0].dead == "closed"


async def test_pressure_in_the_engine_is_an_answer_to_retry(world: World) -> None:
    make = Servers(world.model_dir)
    async with world.pod(make=make, max_waiting=3) as _:
        make.made[0].queued = 3
        body = await world.answer(make_request())
        assert (body.kind, body.retryable) == ("refused", True)
        assert "3 turns wait in the engine, max_waiting is 3" in body.reason
        make.made[0].queued = 2
        assert (await world.answer(make_request("next"))).kind == "done"
