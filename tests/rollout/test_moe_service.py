"""A mixture of experts behind the service: `model.routing: replay` on the wire."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from services.rollout.config import RolloutConfig
from services.rollout.routing_size import routing_bytes
from services.rollout.service import make_engine, serve
from shared.wire.messages import RoutingHeld
from tests.rollout.moe_models import CHOICES, LAYERS, make_moe_state, moe_reference, write_moe_dir
from tests.rollout.pods import World, eventually, make_config, make_request

CONTEXT_BYTES = 96 * LAYERS * CHOICES


def routed(model_dir: Path, routing: str, **rollout: Any) -> RolloutConfig:
    raw = make_config(model_dir, **rollout).model_dump()
    raw["model"]["routing"] = routing
    return RolloutConfig.model_validate(raw)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    path = write_moe_dir(tmp_path / "moe")
    world = World(path, reference=lambda state, ids: moe_reference(state, ids)[0].tolist())
    await world.publish(make_moe_state(0, torch.float32))
    yield world
    await world.bus.close()


@asynccontextmanager
async def serving(world: World, routing: str) -> AsyncIterator[None]:
    context = world.context()
    async with asyncio.TaskGroup() as group:
        task = group.create_task(serve(context, routed(world.model_dir, routing)))
        await eventually(lambda: context.health.ready)
        assert context.counters.get("canary_failures", 0) == 0
        yield
        context.stop.set()
        async with asyncio.timeout(5):
            await task


async def test_answers_carry_the_routing_that_the_caller_lacks(world: World) -> None:
    async with serving(world, "replay"):
        first = (await world.answer(make_request("a"))).sampled
        ids = [1, 2, 3, *first.token_ids.numpy().tolist()]
        held = RoutingHeld(version=0, stop=7)
        second = await world.answer(make_request("b", (*ids, 4, 5), routing_held=held))
        whole = [*ids, 4, 5, *second.sampled.token_ids.numpy().tolist()]
        _, experts = moe_reference(make_moe_state(0, torch.float32), whole)
        for sampled, start, stop in ((first, 0, 7), (second.sampled, 7, 14)):
            (record,) = sampled.routing
            assert (record.version, record.start, record.stop) == (0, start, stop)
            assert record.experts.dtype == "u1"
            assert np.array_equal(record.experts.numpy(), experts[start:stop])


async def test_under_recompute_nothing_is_recorded(world: World) -> None:
    async with serving(world, "recompute"):
        assert (await world.answer(make_request())).sampled.routing == ()


def test_a_dense_model_cannot_be_replayed(untied_dir: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.routing: replay: .* has no experts"):
        make_engine(routed(untied_dir, "replay"))


@pytest.mark.parametrize(("max_payload", "warned"), [(CONTEXT_BYTES - 1, 1), (CONTEXT_BYTES, 0)])
async def test_contexts_whose_routing_no_answer_can_carry_are_warned_of_at_start(
    world: World, caplog: pytest.LogCaptureFixture, max_payload: int, warned: int
) -> None:
    world.server.max_payload = max_payload
    with caplog.at_level("WARNING"):
        async with serving(world, "replay"):
            pass
    assert [r.message for r in caplog.records].count("long_answers_will_be_refused") == warned


def test_routing_takes_a_byte_per_choice_and_two_above_256_experts(tmp_path: Path) -> None:
    for experts, expected in ((256, 3 * 2 * 2), (257, 2 * 3 * 2 * 2)):
        path = write_moe_dir(tmp_path / str(experts), num_experts=experts)
        raw = json.loads((path / "config.json").read_text())
        assert routing_bytes(raw, 3) == expected
    assert routing_bytes(raw | {"model_type": "qwen3"}, 3) == 0


async def test_an_answer_above_the_bound_of_the_bus_is_refused_for_good(world: World) -> None:
    world.server.max_payload = 600
    async with serving(world, "replay"):
        body = await world.answer(make_request("long", new=80))
        assert body.kind == "refused"
        assert not body.retryable
        assert "the answer is too large" in body.reason
        assert "the server accepts 600; raise its max_payload" in body.reason
        assert (await world.answer(make_request("short", new=2))).kind == "done"
