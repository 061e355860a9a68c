"""Blobs go when nothing points at them any more, and not before."""

from __future__ import annotations

import pytest

from services.learner.blob_sweep import POINTING, BlobSweep
from shared.runtime.jetstream import DUPLICATE_WINDOW_S
from shared.runtime.memory_bus import MemoryBus
from shared.runtime.memory_server import MemoryServer
from shared.wire.subjects import Subjects

SUBJECTS = Subjects("t")


class World:
    """A bus whose messages hold 500 bytes at most, on a clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.server = MemoryServer(
            max_payload=1000, clock=lambda: self.now, monotonic=lambda: self.now
        )
        self.bus = MemoryBus(SUBJECTS, self.server)
        self.sweeper = BlobSweep(self.bus)

    async def sweep(self, older_than: float = 1e9) -> int:
        return await self.sweeper.sweep(older_than)

    async def num_chunks(self) -> int:
        return (await self.bus.stream_state("blobs")).num_messages


def large(letter: str) -> bytes:
    return letter.encode() * 1200  # three chunks


@pytest.fixture
async def world() -> World:
    world = World()
    await world.bus.create_streams()
    return world


async def test_a_blob_goes_once_the_message_that_points_at_it_is_purged(world: World) -> None:
    for letter in "abc":
        await world.bus.append(SUBJECTS.terminal(letter), large(letter))
    assert await world.sweep() == 0
    await world.bus.purge("terminals", 3)
    assert await world.sweep() == 2
    assert await world.num_chunks() == 3
    assert (await world.bus.last(SUBJECTS.terminal("c"))).payload == large("c")
    await world.bus.purge("terminals", 4)
    assert await world.sweep() == 1
    assert await world.num_chunks() == 0


async def test_what_a_second_message_points_at_stays(world: World) -> None:
    await world.bus.append(SUBJECTS.terminal("a"), large("a"))
    await world.bus.append(SUBJECTS.dead("learner"), large("a"))
    await world.bus.purge("terminals", 2)
    assert await world.sweep() == 0
    assert (await world.bus.last(SUBJECTS.dead("learner"))).payload == large("a")


@pytest.mark.parametrize("name", POINTING)
async def test_pointers_of_every_stream_count(world: World, name: str) -> None:
    subject = {
        "tickets": SUBJECTS.ticket("t"),
        "terminals": SUBJECTS.terminal("t"),
        "scores": SUBJECTS.score("t"),
        "partials": SUBJECTS.partial("t"),
        "journal": SUBJECTS.journal,
        "manifests": SUBJECTS.manifest,
        "stats": SUBJECTS.stats("step"),
        "dead": SUBJECTS.dead("learner"),
    }[name]
    await world.bus.append(subject, large("x"))
    assert await world.sweep() == 0
    assert (await world.bus.last(subject)).payload == large("x")


async def test_a_blob_whose_pointer_may_be_on_its_way_stays_until_it_is_old(world: World) -> None:
    real = world.server.append

    def crash_before_the_pointer(name: str, subject: str, *rest: object) -> int:
        if ".blob." not in subject:
            raise ConnectionError
        return real(name, subject, *rest)  # type: ignore[arg-type]

    world.server.append = crash_before_the_pointer  # type: ignore[method-assign]
    with pytest.raises(ConnectionError):
        await world.bus.append(SUBJECTS.score("t"), large("s"))
    world.server.append = real  # type: ignore[method-assign]
    assert await world.sweep(older_than=999.0) == 0
    # The same score is stored by another oracle, much later: its blob is young again.
    world.now += 10 * DUPLICATE_WINDOW_S
    await world.bus.append(SUBJECTS.score("other"), large("s"))
    await world.bus.purge("scores", 2)
    assert await world.sweep(older_than=world.now - 1.0) == 0
    assert await world.sweep(older_than=world.now) == 1
    assert await world.num_chunks() == 0


async def test_what_is_stored_while_the_sweep_judges_survives_it(world: World) -> None:
    await world.bus.append(SUBJECTS.score("a"), large("s"))
    await world.bus.purge("scores", 2)
    world.now += 10 * DUPLICATE_WINDOW_S
    real = world.bus.last

    async def last(subject: str):  # type: ignore[no-untyped-def]
        record = await real(subject)
        if ".blob." in subject:
            world.bus.last = real  # type: ignore[method-assign]
            await world.bus.append(SUBJECTS.score("b"), large("s"))
        return record

    world.bus.last = last  # type: ignore[method-assign]
    assert await world.sweep(older_than=world.now - 1.0) == 1
    assert (await world.bus.last(SUBJECTS.score("b"))).payload == large("s")


async def test_messages_are_looked_at_once_and_not_at_all_without_blobs(world: World) -> None:
    seen: list[int] = []
    real = world.bus.blob_of

    async def blob_of(stream, seq: int) -> str | None:  # type: ignore[no-untyped-def]
        seen.append(seq)
        return await real(stream, seq)

    world.bus.blob_of = blob_of  # type: ignore[method-assign]
    for number in range(5):
        await world.bus.append(SUBJECTS.terminal(f"t{number}"), b"x")
    await world.sweep()
    assert seen == []
    await world.bus.append(SUBJECTS.terminal("large"), large("a"))
    await world.sweep()
    await world.bus.append(SUBJECTS.terminal("one-more"), b"x")
    await world.sweep()
    assert seen == [1, 2, 3, 4, 5, 6, 7]
