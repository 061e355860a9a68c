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

    The first error ends the others and is raised as it is, not in a group.
    """
    results: dict[int, R] = {}
    remaining = iter(numbers)

    async def worker() -> None:
        for number in remaining:
            results[number] = await work(number)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(window, len(numbers))):
                group.create_task(worker())
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [results[number] for number in numbers]
