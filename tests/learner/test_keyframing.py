from __future__ import annotations

import asyncio
import time
from typing import Any

import numpy as np
import pytest
import torch

from services.learner import keyframing
from services.learner.keyframing import MAX_PAUSE_S, WANTED_PAUSE_S, Keyframing, asks
from services.learner.keyframing import keyframe_reason as reason_of
from shared.runtime.context import Context
from shared.runtime.errors import StreamFull
from shared.runtime.leases import LeaseBoard
from shared.runtime.logs import Log
from shared.runtime.memory_bus import MemoryBus
from shared.runtime.memory_server import MemoryServer
from shared.weights.canary import canary_tokens, make_canary
from shared.weights.chunks import upload
from shared.weights.manifest_log import read_log
from shared.weights.orphans import ORPHAN_AGE_S
from shared.weights.publisher import Publisher
from shared.wire.codec import encode
from shared.wire.subjects import Subjects
from shared.wire.telemetry import Lease, Role

SUBJECTS = Subjects("t")


def lease(role: Role = "rollout", **gauges: float) -> Lease:
    return Lease(
        role=role, pod="p0", incarnation="i", pid=1, sent_at=0.0, ready=True, gauges=gauges
    )


@pytest.mark.parametrize(
    ("due", "gauges", "since_last_s", "reason"),
    [
        (False, {}, 1e9, None),
        (True, {}, 0.0, "due"),
        (True, {"keyframe_wanted": 1.0}, 0.0, "due"),
        (False, {"keyframe_wanted": 1.0}, WANTED_PAUSE_S + 1, "wanted"),
        (False, {"keyframe_wanted": 1.0}, WANTED_PAUSE_S - 1, None),
        (False, {"keyframe_wanted": 0.0}, 1e9, None),
    ],
)
def test_a_keyframe_is_published_when_due_or_when_a_follower_has_no_way_left(
    due, gauges, since_last_s, reason
):
    wanted = asks([lease(), lease(**gauges)])
    assert reason_of(due=due, wanted=wanted, since_last_s=since_last_s) == reason


class World:
    """A learner's publisher and its keyframing, on a clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.server = MemoryServer(max_payload=65536)
        self.bus = MemoryBus(SUBJECTS, self.server, name="learner", retry_s=0.05)
        self.context = Context("learner", "l0", "i", self.bus, Log("learner"))
        self.publisher = Publisher(
            self.bus,
            model_id="policy",
            producer="l0",
            keyframe_every=2,
            chunk_bytes=100,
            log=Log("learner"),
        )
        self.board = LeaseBoard(self.bus, 6.0, lambda: self.now)
        self.own_wants = False
        self.keyframing = Keyframing(
            self.context,
            self.publisher,
            self.board,
            own_wants=lambda: self.own_wants,
            clock=lambda: self.now,
        )

    async def publish(self, versions: int) -> None:
        canary = make_canary(
            lambda ids: [np.zeros(len(i), np.float32) for i in ids],
            canary_tokens(10, 16, 0),
            torch.float32,
        )
        for version in range(versions):
            state = {"w": torch.full((100,), float(version))}
            await self.publisher.publish(state, canary=canary, epoch=0, optimizer_steps=0)

    async def look_for(self, seconds: int) -> list[float]:
        """Look once a second; return when a keyframe failed, seconds from now on."""
        began, failed = self.now, []
        for _ in range(seconds):
            before = self.context.counters.get("keyframes_failed", 0)
            await self.keyframing.look()
            if self.context.counters.get("keyframes_failed", 0) > before:
                failed.append(self.now - began)
            self.now += 1.0
        return failed

    async def keyframes(self) -> list[int]:
        return [keyframe.version for keyframe in (await read_log(self.bus)).keyframes]

    async def uploads(self) -> set[str]:
        subjects = await self.bus.subjects_of("chunks", f"{SUBJECTS.prefix}.chunk.*.*")
        return {subject.split(".")[-2] for subject in subjects}

    def refuse_keyframes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real = self.bus.append

        async def append(subject: str, payload: bytes, **options: Any) -> int:
            if "-k." in subject and not subject.endswith(".0"):
                raise StreamFull(subject)  # once the first chunk is stored
            return await real(subject, payload, **options)

        monkeypatch.setattr(self.bus, "append", append)


@pytest.fixture
async def world() -> World:
    world = World()
    await world.bus.create_streams()
    await world.publisher.start()
    await world.board.start()
    return world


async def orphan(world: World, upload_id: str, num_bytes: int = 100) -> None:
    await upload(
        world.bus,
        "delta",
        [bytes(num_bytes)],
        upload_id=upload_id,
        encoding="x",
        chunk_bytes=100,
    )


async def test_a_keyframe_is_made_once_enough_versions_are_published(world: World) -> None:
    await world.publish(2)
    await world.look_for(3)
    assert await world.keyframes() == []
    await world.publish(1)
    await world.look_for(3)
    assert await world.keyframes() == [2]
    assert world.context.counters["keyframes_due"] == 1


@pytest.mark.parametrize("role", ["rollout", "logit_oracle"])
async def test_a_follower_that_asks_gets_one_and_not_one_per_lease(
    world: World, role: Role
) -> None:
    await world.publish(2)
    follower = MemoryBus(SUBJECTS, world.server, name="follower")
    for second in range(9):
        await follower.publish(SUBJECTS.leases, encode(lease(role, keyframe_wanted=1.0)))
        await asyncio.sleep(0)
        await world.look_for(1)
        if second:
            assert await world.keyframes() == [1]
    assert world.context.counters["keyframes_wanted"] == 1


async def test_a_follower_inside_the_learner_asks_without_a_lease(world: World) -> None:
    await world.publish(2)
    await world.look_for(1)
    assert await world.keyframes() == []
    world.own_wants = True
    await world.look_for(1)
    assert await world.keyframes() == [1]


async def test_a_keyframe_that_fails_is_tried_again_with_growing_pauses_up_to_a_bound(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.publish(3)
    before = await world.uploads()
    with monkeypatch.context() as full:
        world.refuse_keyframes(full)
        failed = await world.look_for(2300)
    pauses = np.diff(failed).tolist()
    assert failed[0] == 0.0
    assert pauses == [10.0, 20.0, 40.0, 80.0, 160.0, 320.0, MAX_PAUSE_S, MAX_PAUSE_S]
    assert await world.uploads() == before
    # Once one succeeds, pauses begin small again.
    await world.look_for(int(MAX_PAUSE_S) + 1)
    assert await world.keyframes() == [2]
    await world.publish(2)
    world.refuse_keyframes(monkeypatch)
    assert np.diff(await world.look_for(40)).tolist() == [10.0, 20.0]


async def test_other_uploads_and_sweeps_go_on_while_keyframes_fail(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.publish(3)
    world.refuse_keyframes(monkeypatch)
    await world.look_for(1)
    await world.publish(1)
    assert world.publisher.head.version == 3
    monkeypatch.setattr(world.publisher, "_clock", lambda: time.time() + 2 * ORPHAN_AGE_S)
    await orphan(world, "left-behind")
    await world.look_for(int(ORPHAN_AGE_S))
    assert "left-behind" not in await world.uploads()


async def test_orphans_are_swept_at_start_and_while_running_and_counted(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.publish(1)
    monkeypatch.setattr(world.publisher, "_clock", lambda: time.time() + 2 * ORPHAN_AGE_S)
    named = await world.uploads()
    await orphan(world, "of-the-dead")
    await world.look_for(1)
    assert await world.uploads() == named
    await orphan(world, "later")
    await world.look_for(int(ORPHAN_AGE_S / 2) - 2)
    assert "later" in await world.uploads()
    await world.look_for(4)
    assert await world.uploads() == named
    assert world.context.counters["orphans_swept"] == 2


async def test_blobs_that_nothing_points_at_are_swept_too(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.bus.append(SUBJECTS.terminal("large"), bytes(world.bus.max_payload))
    await world.bus.purge("terminals", 2)
    await world.look_for(1)
    assert (await world.bus.stream_state("blobs")).num_messages == 2  # too young
    later = time.time() + 2 * ORPHAN_AGE_S
    monkeypatch.setattr(keyframing.time, "time", lambda: later)
    world.now += ORPHAN_AGE_S
    await world.look_for(1)
    assert (await world.bus.stream_state("blobs")).num_messages == 0
    assert world.context.counters["blobs_swept"] == 1


async def test_the_sweep_makes_room_for_the_keyframe(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.publish(3)
    monkeypatch.setattr(world.publisher, "_clock", lambda: time.time() + 2 * ORPHAN_AGE_S)
    await orphan(world, "of-the-dead", 2000)
    stream = world.server.streams[SUBJECTS.stream("chunks")]
    monkeypatch.setattr(stream, "max_bytes", stream.num_bytes)  # full
    assert await world.look_for(1) == []
    assert await world.keyframes() == [2]


async def test_a_sweep_that_fails_does_not_keep_the_keyframe(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fails() -> int:
        raise StreamFull("chunks")

    await world.publish(3)
    monkeypatch.setattr(world.publisher, "sweep_orphans", fails)
    await world.look_for(1)
    assert await world.keyframes() == [2]


async def test_it_runs_by_itself_until_cancelled(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keyframing, "_POLL_S", 0.001)
    await world.publish(3)
    running = asyncio.create_task(world.keyframing.run())
    async with asyncio.timeout(5):
        while not await world.keyframes():  # noqa: ASYNC110 - any condition, test code
            await asyncio.sleep(0.005)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert running.cancelled()
