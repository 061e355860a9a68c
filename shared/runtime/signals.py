"""Stop signals, from a process's first moment on.

As PID 1 of a container a process ignores every signal that it does not handle itself: without a
handler SIGTERM would do nothing, and the kubelet kill it after the whole grace period.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

CANCELLATIONS = 10
CANCEL_S = 0.2
"""For one of them."""


def leave_at_sigterm(code: int = 0) -> None:
    """End the process at SIGTERM: while it has nothing to hand back, or for good."""
    signal.signal(signal.SIGTERM, lambda *_: os._exit(code))


def stop_on_signals(stop: asyncio.Event, told: Callable[[str], None]) -> None:
    """Set `stop` at the first SIGTERM or SIGINT, `told` its name; at the second, out at once."""

    def heard(number: int) -> None:
        if stop.is_set():
            os._exit(128 + number)
        told(signal.Signals(number).name)
        stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, heard, number)


def end_at_signals(code: int) -> None:
    """From now on SIGTERM ends the process with `code` and no word: its last one is said.

    torchrun sends it to every rank when one of them has ended.
    """
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.remove_signal_handler(number)
    leave_at_sigterm(code)


async def unless_stopped(stop: asyncio.Event, work: Coroutine[Any, Any, T]) -> T | None:
    """Return what `work` returns, or None when `stop` came first: `work` is then cancelled.

    Raises:
        Exception: what `work` raised.
    """
    working, stopped = asyncio.ensure_future(work), asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait([working, stopped], return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        stopped.cancel()
        # More than once: asyncio.wait_for of Python 3.11, which the NATS client connects with,
        # loses a cancellation that meets the end of what it waits for.
        for _ in range(CANCELLATIONS):
            working.cancel()
            if (await asyncio.wait([working], timeout=CANCEL_S))[0]:
                break
