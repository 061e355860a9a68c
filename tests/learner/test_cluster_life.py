"""What a learner does for a cluster: stays when it is done, purges without a recorder, measures."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from services.learner import service
from services.learner.config import LearnerConfig
from services.learner.step_telemetry import bounds
from shared.runtime.context import Context
from shared.runtime.logs import Log
from shared.runtime.memory_bus import MemoryBus
from shared.runtime.memory_server import MemoryServer
from shared.wire.codec import decode
from shared.wire.subjects import STREAMS, Subjects
from shared.wire.weights import Control
from tests.learner.crash_world import NUM_VERSIONS, config_for, players


@pytest.fixture(autouse=True)
def quick_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "_TICK_S", 0.02)
    monkeypatch.setattr(service, "_STREAMS_LOOK_S", 0.02)


@pytest.fixture
async def server() -> AsyncIterator[MemoryServer]:
    server = MemoryServer()
    async with players(server):
        yield server


def context_on(server: MemoryServer) -> Context:
    bus = MemoryBus(Subjects("crash"), server)
    return Context("learner", "learner-0", "first", bus, Log("learner"))


def changed(config: LearnerConfig, section: str, **values: object) -> LearnerConfig:
    part = getattr(config, section).model_copy(update=values)
    return config.model_copy(update={section: part})


async def done(context: Context) -> None:
    await context.bus.wait_for_streams(60)
    async with asyncio.timeout(60):
        while True:
            payload = await context.bus.get_control("control")
            ready = context.health.ready  # a former process has left a control document, too
            if ready and payload is not None and decode(payload, Control).phase == "done":
                return
            await asyncio.sleep(0.02)


async def test_with_at_end_wait_a_finished_learner_stays_ready_until_it_is_told_to_stop(
    server: MemoryServer, model_dir: Path, tmp_path: Path
):
    config = changed(config_for(model_dir, tmp_path), "learner", at_end="wait")
    for _ in ("the run", "a restart of the pod afterwards"):
        context = context_on(server)
        running = asyncio.create_task(service.serve(context, config))
        await done(context)
        await asyncio.sleep(0.2)
        assert not running.done()
        assert context.health.ready
        assert context.version == NUM_VERSIONS
        context.stop.set()
        async with asyncio.timeout(10):
            await running


async def test_by_default_a_finished_learner_ends(
    server: MemoryServer, model_dir: Path, tmp_path: Path
):
    async with asyncio.timeout(60):
        await service.serve(context_on(server), config_for(model_dir, tmp_path))


@pytest.mark.parametrize("archive", [False, True])
async def test_without_an_archive_what_no_checkpoint_needs_is_purged_and_with_one_it_waits(
    server: MemoryServer, model_dir: Path, tmp_path: Path, archive: bool
):
    config = changed(config_for(model_dir, tmp_path), "run", archive=archive)
    config = changed(config, "learner", versions=12)
    context = context_on(server)
    async with asyncio.timeout(100):
        await service.serve(context, config)
    first = {n: (await context.bus.stream_state(n)).first_seq for n in ("terminals", "scores")}  # type: ignore[arg-type]
    assert (first == {"terminals": 1, "scores": 1}) is archive, first


async def test_streams_and_bounds_are_measured_for_alerts_and_autoscalers(
    server: MemoryServer, model_dir: Path, tmp_path: Path
):
    config = config_for(model_dir, tmp_path)
    context = context_on(server)
    async with asyncio.timeout(60):
        await service.serve(context, config)
    names = {spec.name for spec in STREAMS}
    assert context.labelled["stream_bytes", "stream"].keys() == names
    assert context.labelled["stream_messages", "stream"]["journal"] > 0
    assert "policy_version" not in context.gauges, "it is exported once, by the runtime"
    expected = {
        "staleness_bound": 2.0, "groups_per_version": 2.0, "target_version": float(NUM_VERSIONS),
        "stream_limit_bytes": float(4 * 1024**3), "exact_route": 1.0,
        "checkpoint_every_versions": float(config.learner.checkpoint.every_versions),
    }  # fmt: skip
    assert bounds(config) == expected
    assert context.measured.items() >= expected.items()
    assert context.measured["checkpoint_version"] >= 0
    assert bounds(config_for(model_dir, tmp_path, "rollout"))["exact_route"] == 0.0
