"""An iterator whose items are work, advanced in a thread while the event loop goes on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Generator, Iterable
from typing import TypeVar

T = TypeVar("T")


async def pull(source: Iterable[T], *, stall_s: float | None = None) -> AsyncGenerator[T, None]:
    """Yield the items of `source`, each made in a thread when it is asked for.

    Close it (`contextlib.aclosing`): once closed nobody touches the source any more, also when
    the consumer was cancelled, and a generator is closed, too.

    Args:
        source: advanced by one thread at a time.
        stall_s: how long one item may take; its thread is then left to itself.

    Raises:
        TimeoutError: an item took longer than `stall_s`.
    """
    iterator = iter(source)
    loop = asyncio.get_running_loop()
    end = object()
    hop: asyncio.Future[T | object] | None = None
    try:
        while True:
            hop = loop.run_in_executor(None, next, iterator, end)
            await asyncio.wait([hop], timeout=stall_s)
            if not hop.done():
                # Heard by nobody: the thread may never come back.
                hop.add_done_callback(_ignore)
                hop = None
                raise TimeoutError(f"nothing came for {stall_s:g} s")
            item = hop.result()
            if item is end:
                return
            yield item  # pyright: ignore[reportReturnType]
    finally:
        if hop is not None:
            if not hop.done():
                # Cancelled: whoever owns what the thread reads may change it once this ends.
                hop.add_done_callback(_ignore)
                await asyncio.wait([hop], timeout=stall_s)
            if hop.done() and isinstance(iterator, Generator):
                iterator.close()


def _ignore(hop: asyncio.Future[object]) -> None:
    if not hop.cancelled():
        hop.exception()
