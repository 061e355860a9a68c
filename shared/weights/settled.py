"""Number crunching that a cancellation does not leave half done."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar, cast

from shared.weights.offload import INLINE_BYTES

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Settled(Generic[R]):
    """How a piece of work ended. What it did is done, whether or not it was cancelled."""

    value: R | None
    error: Exception | None
    cancelled: asyncio.CancelledError | None
    """The waiting task was cancelled meanwhile."""

    def result(self) -> R:
        """Return the value, or raise what there is to raise, a cancellation first."""
        if self.cancelled is not None:
            raise self.cancelled from self.error
        if self.error is not None:
            raise self.error
        return cast("R", self.value)


async def settled(num_bytes: int, work: Callable[[], R]) -> Settled[R]:
    """Run `work` over `num_bytes` to its end: inline when small, else in a thread.

    A thread cannot be cancelled: the caller books its effects first, and then calls `result`.
    """
    if num_bytes <= INLINE_BYTES:
        return _outcome(work, None)
    # A future, not a task: when the event loop ends it cancels all tasks, and would not wait.
    context = contextvars.copy_context()
    running = asyncio.get_running_loop().run_in_executor(None, context.run, work)
    cancelled = None
    while not running.done():
        try:
            await asyncio.wait((running,))
        except asyncio.CancelledError as error:
            cancelled = error
    return _outcome(running.result, cancelled)


def _outcome(work: Callable[[], R], cancelled: asyncio.CancelledError | None) -> Settled[R]:
    try:
        return Settled(work(), None, cancelled)
    except Exception as error:  # noqa: BLE001 - handed on by `result`
        return Settled(None, error, cancelled)
