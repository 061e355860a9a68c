"""Where the number crunching of one version runs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

R = TypeVar("R")

INLINE_BYTES = 4 * 1024 * 1024
"""Up to so many bytes the work takes a few milliseconds, less than a thread hop may cost a busy
event loop; beyond it a thread keeps the loop answering."""


async def crunch(num_bytes: int, work: Callable[[], R]) -> R:
    """Run `work` over `num_bytes`: inline when small, else in a thread."""
    if num_bytes <= INLINE_BYTES:
        return work()
    return await asyncio.to_thread(work)
