"""Bounded concurrency over numbered pieces of work."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

R = TypeVar("R")


async def fan_out(
    work: Callable[[int], Awaitable[R]], numbers: range, *, window: int = 4
) -> list[R]:
    """Return `work(n)` for every n in order, at most `window` at a time.

    After the first error no further piece is begun; it is raised as it is once the pieces under
    way have ended.
    """
    results: dict[int, R] = {}
    failures: list[Exception] = []
    remaining = iter(numbers)

    async def worker() -> None:
        for number in remaining:
            if failures:
                return
            try:
                results[number] = await work(number)
            except Exception as error:  # noqa: BLE001 - raised below, once nothing runs any more
                failures.append(error)

    # The group itself must not see the error: before Python 3.11.4 a task that survives the error
    # of its TaskGroup keeps a cancellation request, and its later timeouts never end.
    async with asyncio.TaskGroup() as group:
        for _ in range(min(window, len(numbers))):
            group.create_task(worker())
    if failures:
        raise failures[0]
    return [results[number] for number in numbers]
