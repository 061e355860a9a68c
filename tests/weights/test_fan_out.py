from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest

from shared.weights.fan_out import fan_out, in_order


class Work:
    """Doubles a number after a while; counts how many run at once."""

    def __init__(self) -> None:
        self.running = self.peak = self.begun = 0

    async def __call__(self, number: int) -> int:
        self.begun += 1
        self.running += 1
        self.peak = max(self.peak, self.running)
        try:
            await asyncio.sleep(0.002 * (number % 3))
            if number == 99:
                raise LookupError(number)
        finally:
            self.running -= 1
        return number * 2


async def test_fan_out_keeps_order_runs_a_window_at_once_and_raises_the_error_itself() -> None:
    work = Work()
    assert await fan_out(work, range(10), window=3) == list(range(0, 20, 2))
    assert work.peak == 3
    assert await fan_out(work, range(0), window=3) == []
    with pytest.raises(LookupError):
        await fan_out(work, range(90, 120))
    assert work.running == 0


async def test_nothing_further_is_begun_after_the_first_failure() -> None:
    work = Work()
    with pytest.raises(LookupError):
        await fan_out(work, range(97, 1000), window=2)
    assert work.begun <= 4


async def test_work_goes_on_while_the_consumer_is_busy_but_only_a_window_ahead() -> None:
    work = Work()
    taken = 0
    async with aclosing(in_order(work, range(20), window=5)) as results:
        async for result in results:
            assert result == taken * 2
            taken += 1
            await asyncio.sleep(0.01)
            assert work.running == 0
            assert work.begun == min(20, taken + 4)


async def test_leaving_the_loop_early_ends_what_is_under_way() -> None:
    work = Work()
    async with aclosing(in_order(work, range(100), window=5)) as results:
        async for _ in results:
            break
    assert work.running == 0
    assert len(asyncio.all_tasks()) == 1


async def test_a_failure_is_raised_though_an_earlier_piece_never_ends() -> None:
    async def work(number: int) -> int:
        if number == 2:
            raise LookupError(number)
        await asyncio.sleep(60)
        return number

    with pytest.raises(LookupError):
        await fan_out(work, range(10), window=4)


async def test_a_consumer_that_is_cancelled_while_it_waits_cancels_the_work() -> None:
    work = Work()

    async def consume() -> None:
        async with aclosing(in_order(work, iter(range(100, 3000)), window=3)) as results:
            async for _ in results:
                await asyncio.sleep(0)

    consuming = asyncio.ensure_future(consume())
    await asyncio.sleep(0.02)
    consuming.cancel()
    with pytest.raises(asyncio.CancelledError):
        await consuming
    assert work.running == 0
