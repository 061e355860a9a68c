from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import pytest

from shared.weights import settled
from shared.weights.errors import MissingVersion
from shared.weights.links import Link
from shared.weights.loading import Load
from shared.weights.spool import Spool
from tests.weights.chains import (
    Chain,
    bits_of,
    soon,
)

# --- one at a time


async def test_a_lease_is_exclusive() -> None:
    chain = Chain(4)
    history = await chain.history(3)
    order: list[str] = []

    async def reader(version: int) -> None:
        async with history.at(version) as state:
            order.append(f"in {version}")
            await soon()
            assert bits_of(state) == chain.bits[version]
            order.append(f"out {version}")

    async def writer() -> None:
        await chain.apply(history, 3)
        order.append("applied")

    async with asyncio.TaskGroup() as group:
        group.create_task(reader(0))
        group.create_task(reader(2))
        group.create_task(writer())
        group.create_task(reader(1))
    assert order == ["in 0", "out 0", "in 2", "out 2", "applied", "in 1", "out 1"]
    await chain.must_hold(history, 0, 1, 2, 3)


async def test_a_version_that_is_evicted_while_somebody_waits_for_it_is_missing() -> None:
    chain = Chain(3)
    history = await chain.history(3)

    async def late() -> None:
        async with history.at(0):
            pytest.fail("evicted")

    async with history.at(2):
        waiting = asyncio.create_task(late())
        await soon()
        history.evict_below(2)
    with pytest.raises(MissingVersion):
        await waiting


async def test_an_exception_or_a_cancellation_inside_the_block_ends_the_lease() -> None:
    chain = Chain(3)
    history = await chain.history(3)
    with pytest.raises(ZeroDivisionError):
        async with history.at(0):
            raise ZeroDivisionError

    async def hang() -> None:
        async with history.at(1):
            await asyncio.Event().wait()

    hanging = asyncio.create_task(hang())
    await soon()
    assert history._lock.locked()
    hanging.cancel()
    with pytest.raises(asyncio.CancelledError):
        await hanging
    await chain.must_hold(history, 0, 1, 2)


async def test_who_gives_up_waiting_for_the_copy_closes_what_was_handed_over() -> None:
    chain = Chain(3)
    history = await chain.history(2)
    pieces = chain.keyframe(2)
    async with history.at(0):
        waiting = [
            asyncio.create_task(chain.apply(history, 2)),
            asyncio.create_task(history.load_keyframe(chain.manifests[2], pieces)),
        ]
        await soon()
        for task in waiting:
            task.cancel()
        results = await asyncio.gather(*waiting, return_exceptions=True)
    assert all(isinstance(result, asyncio.CancelledError) for result in results)
    assert chain.open_spools == 1
    assert [piece async for piece in pieces] == []
    await chain.must_hold(history, 0, 1)


async def test_a_block_that_would_wait_for_itself_is_told_so() -> None:
    chain = Chain(3)
    history = await chain.history(2)
    async with history.at(0):
        with pytest.raises(RuntimeError, match="itself"):
            await chain.apply(history, 2)
        with pytest.raises(RuntimeError, match="itself"):
            async with history.at(1):
                pytest.fail("lent twice")
    await chain.must_hold(history, 0, 1)


# --- cancelled while a thread writes


class GatedSpool(Spool):
    """Holds the thread that reads it, once `gate` is there, after some more reads."""

    def __init__(self) -> None:
        super().__init__()
        self.num_free_reads = 0
        self.gate: threading.Event | None = None
        self.is_reached = threading.Event()
        self.error: Exception | None = None

    def read(self, offset: int, num_bytes: int) -> memoryview:
        if self.gate is not None:
            self.num_free_reads -= 1
        if self.gate is not None and self.num_free_reads < 0:
            self.is_reached.set()
            assert self.gate.wait(10)
            if self.error is not None:
                raise self.error
        return super().read(offset, num_bytes)


@contextmanager
def _threads() -> Iterator[None]:
    """However small the model is, the work runs in a thread."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(settled, "INLINE_BYTES", -1)
        yield


async def _cancel_halfway(task: asyncio.Task[None], spool: GatedSpool) -> None:
    """Cancel a task, repeatedly, while its thread is at work; it must not end before that."""
    assert spool.gate is not None
    await asyncio.to_thread(spool.is_reached.wait, 10)
    for _ in range(3):
        task.cancel()
        await soon()
        assert not task.done()
    spool.gate.set()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_move_that_is_cancelled_ends_at_a_version() -> None:
    chain, gated = Chain(5), GatedSpool()
    with _threads():
        history = await chain.history(2)
        await chain.apply(history, 2, chain.spool(2, gated))
        await chain.apply(history, 3)
        gated.gate = threading.Event()

        async def go() -> None:
            async with history.at(0):
                pytest.fail("cancelled on the way")

        task = asyncio.create_task(go())
        await _cancel_halfway(task, gated)
        assert history.position == 1
        await chain.must_hold(history, 0, 1, 2, 3)
    assert history.faults == 0


async def test_nobody_gets_the_copy_while_a_cancelled_move_is_still_at_it() -> None:
    chain, gated = Chain(3), GatedSpool()
    with _threads():
        history = await chain.history(2)
        await chain.apply(history, 2, chain.spool(2, gated))
        gated.gate = threading.Event()

        async def go(version: int) -> None:
            async with history.at(version) as state:
                assert bits_of(state) == chain.bits[version]

        first = asyncio.create_task(go(1))
        second = asyncio.create_task(go(2))
        await _cancel_halfway(first, gated)
        await second
        await chain.must_hold(history, 0, 1, 2)


@pytest.mark.parametrize("num_reads", range(7))
async def test_a_delta_whose_taking_in_is_cancelled_is_held_or_closed(num_reads: int) -> None:
    chain, gated = Chain(4), GatedSpool()
    with _threads():
        history = await chain.history(2)
        gated.num_free_reads, gated.gate = num_reads, threading.Event()
        task = asyncio.create_task(chain.apply(history, 2, chain.spool(2, gated)))
        await _cancel_halfway(task, gated)
        is_held = 2 in history.versions
        assert chain.open_spools == 1 + is_held
        await chain.must_hold(history, 0, 1, *([2] if is_held else []))
        await chain.apply(history, 2)
        await chain.apply(history, 3)
        await chain.must_hold(history, 0, 1, 2, 3)


async def test_a_cancelled_move_along_a_bad_delta_still_gives_it_up() -> None:
    chain, gated = Chain(3), GatedSpool()
    with _threads():
        history = await chain.history(2)
        await chain.apply(history, 2, chain.spool(2, gated))
        gated.gate, gated.error = threading.Event(), OSError("Input/output error")

        async def go() -> None:
            async with history.at(1):
                pytest.fail("there is no way there")

        await _cancel_halfway(asyncio.create_task(go()), gated)
        assert history.faults == 1
        await chain.must_hold(history, 2)


async def test_a_keyframe_that_is_cancelled_at_its_very_end_is_held() -> None:
    chain = Chain(9)
    with _threads():
        history = await chain.history(3)
        gate, is_reached = threading.Event(), threading.Event()
        finish = Load.finish

        def gated_finish(load: Load) -> Link | None:
            is_reached.set()
            assert gate.wait(10)
            return finish(load)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Load, "finish", gated_finish)
            task = asyncio.create_task(history.load_keyframe(chain.manifests[8], chain.keyframe(8)))
            await asyncio.to_thread(is_reached.wait, 10)
            task.cancel()
            await soon()
            gate.set()
            with pytest.raises(asyncio.CancelledError):
                await task
        await chain.must_hold(history, 0, 1, 2, 8)


async def test_a_keyframe_that_is_cancelled_is_taken_back() -> None:
    chain = Chain(9)
    with _threads():
        history = await chain.history(3)
        reached = asyncio.Event()

        async def pieces() -> AsyncIterator[bytes]:
            async for piece in chain.keyframe(8):
                yield piece
            reached.set()
            await asyncio.Event().wait()

        task = asyncio.create_task(history.load_keyframe(chain.manifests[8], pieces()))
        await reached.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await chain.must_hold(history, 0, 1, 2)


async def test_eviction_and_clearing_while_a_thread_reads_a_delta_wait_for_it() -> None:
    chain, gated = Chain(4), GatedSpool()
    with _threads():
        history = await chain.history(2)
        await chain.apply(history, 2, chain.spool(2, gated))
        await chain.apply(history, 3)
        gated.gate = threading.Event()

        async def go() -> None:
            async with history.at(1):
                pytest.fail("evicted meanwhile")

        task = asyncio.create_task(go())
        await asyncio.to_thread(gated.is_reached.wait, 10)
        assert history.evict_below(3) == (0, 1, 2)
        assert chain.open_spools == 3
        gated.gate.set()
        await asyncio.gather(task, return_exceptions=True)
        await chain.must_hold(history, 3)
        assert chain.open_spools == 0
