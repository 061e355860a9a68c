"""What the learner purges, and what keeps it from purging."""

from __future__ import annotations

import msgpack
import numpy as np
import pytest
import torch

from services.learner.purging import Purging
from shared.runtime.context import Context
from shared.runtime.errors import BusUnavailable
from shared.runtime.logs import Log
from shared.runtime.memory_bus import MemoryBus
from shared.runtime.memory_server import MemoryServer
from shared.weights.canary import canary_tokens, make_canary
from shared.weights.keyframe_store import KeyframeStore
from shared.weights.manifest_log import read_log
from shared.weights.publisher import Publisher
from shared.wire.subjects import Subjects

SUBJECTS = Subjects("t")


class World:
    def __init__(self, store: KeyframeStore) -> None:
        self.bus = MemoryBus(SUBJECTS, MemoryServer(), name="learner", retry_s=0.05)
        self.context = Context("learner", "l0", "i", self.bus, Log("learner"))
        self.publisher = Publisher(
            self.bus,
            model_id="policy",
            producer="l0",
            keyframe_every=2,
            store=store,
            log=Log("learner"),
        )
        self.purging = Purging(self.context, self.publisher)

    async def fill(self) -> None:
        """Versions 0 to 5, 2 and 4 as keyframes, too; nine terminals, nine scores."""
        await self.bus.create_streams()
        await self.publisher.start()
        canary = make_canary(
            lambda ids: [np.zeros(len(i), np.float32) for i in ids],
            canary_tokens(10, 16, 0),
            torch.float32,
        )
        for version in range(6):
            state = {"w": torch.full((100,), float(version))}
            await self.publisher.publish(state, canary=canary, epoch=0, optimizer_steps=0)
            if self.publisher.keyframe_due:
                await self.publisher.publish_keyframe(reason="due")
        for number in range(9):
            await self.bus.append(SUBJECTS.terminal(f"t{number}"), b"x")
            await self.bus.append(SUBJECTS.score(f"t{number}"), b"x")

    async def archived(self, **positions: int) -> None:
        await self.bus.put_control("archived", msgpack.packb(positions))

    async def left(self) -> tuple[int, int, int]:
        """Oldest version, terminal and score."""
        versions = [entry.manifest.version for entry in (await read_log(self.bus)).manifests]
        firsts = [(await self.bus.stream_state(n)).first_seq for n in ("terminals", "scores")]
        return min(versions), *firsts


@pytest.fixture
def store(tmp_path) -> KeyframeStore:
    return KeyframeStore(str(tmp_path))


@pytest.fixture
async def world(store: KeyframeStore) -> World:
    world = World(store)
    await world.fill()
    return world


FLOORS = {"terminals": 6, "scores": 5}


@pytest.mark.parametrize(
    ("archived", "low", "left"),
    [
        ({"versions": 5, "terminals": 9, "scores": 9}, 4, (4, 6, 5)),
        ({"versions": 5, "terminals": 9, "scores": 9}, 3, (2, 6, 5)),
        ({"versions": 3, "terminals": 3, "scores": 9}, 5, (2, 4, 5)),
        ({"versions": -1, "terminals": 0}, 5, (0, 1, 1)),
        ({}, 5, (0, 1, 1)),
    ],
)
async def test_only_what_is_archived_and_below_every_checkpoint_goes(
    world: World, archived, low, left
) -> None:
    await world.archived(**archived)
    await world.purging.purge(low, FLOORS)
    assert await world.left() == left


async def test_nothing_goes_while_nobody_archives(world: World) -> None:
    await world.purging.purge(5, FLOORS)
    assert await world.left() == (0, 1, 1)


async def test_a_store_that_cannot_be_listed_delays_the_purge_of_versions_and_of_nothing_else(
    world: World, store: KeyframeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.archived(versions=5, terminals=9, scores=9)

    def fails() -> dict[str, float]:
        raise PermissionError("the bucket")

    with monkeypatch.context() as unreadable:
        unreadable.setattr(store, "list", fails)
        with pytest.raises(BusUnavailable, match="keyframe_store: the bucket"):
            await world.publisher.purge_below(5)
        await world.purging.purge(5, FLOORS)
        assert await world.left() == (0, 6, 5)
        assert world.context.counters["purges_failed"] == 1
    # Its keyframes were not taken for lost: the newest is still the base to keep.
    assert not world.publisher.keyframe_due
    await world.purging.purge(5, FLOORS)
    assert await world.left() == (4, 6, 5)
