"""Bounded concurrency over pieces of work whose results are wanted in order."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Iterable
from contextlib import aclosing
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


async def fan_out(
    work: Callable[[int], Awaitable[R]], numbers: range, *, window: int = 4
) -> list[R]:
    """Return `work(n)` for every n in order, at most `window` at a time; fails as `in_order`."""
    async with aclosing(in_order(work, numbers, window=window)) as results:
        return [result async for result in results]


async def in_order(
    work: Callable[[T], Awaitable[R]],
    items: AsyncIterable[T] | Iterable[T],
    *,
    window: int,
) -> AsyncGenerator[R, None]:
    """Yield `work(item)` for every item in order, at most `window` begun and not yet taken.

    Items are asked for while earlier ones are worked on, and worked on while the consumer is busy.
    The first failure of any piece is raised as it is, without waiting for the pieces before it,
    and the others are cancelled. Close it (`contextlib.aclosing`) when leaving the loop early.
    """
    # Tasks of its own, no TaskGroup: a group cannot be left at a `yield`, for it would cancel
    # whatever the consumer is doing when a piece fails.
    tasks: deque[asyncio.Future[R]] = deque()
    failures: list[BaseException] = []
    ended = asyncio.Event()

    def note(task: asyncio.Future[R]) -> None:
        ended.set()
        error = None if task.cancelled() else task.exception()
        if error is not None:
            failures.append(error)

    async def first() -> R:
        while not tasks[0].done() and not failures:
            ended.clear()
            await ended.wait()
        if failures:
            raise failures[0]
        return tasks.popleft().result()

    try:
        async with aclosing(_as_async(items)) as source:
            async for item in source:
                task = asyncio.ensure_future(work(item))
                task.add_done_callback(note)
                tasks.append(task)
                if len(tasks) >= window:
                    yield await first()
        while tasks:
            yield await first()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _as_async(items: AsyncIterable[T] | Iterable[T]) -> AsyncGenerator[T, None]:
    if not isinstance(items, AsyncIterable):
        for item in items:
            yield item
    elif isinstance(items, AsyncGenerator):
        async with aclosing(items):
            async for item in items:
                yield item
    else:
        async for item in items:
            yield item
