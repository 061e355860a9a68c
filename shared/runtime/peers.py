"""Work that depends on further processes of the same job."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Protocol

from shared.runtime.errors import Fatal

_LOOK_S = 0.1


class Peers(Protocol):
    """The other processes."""

    @property
    def reason(self) -> str:
        """What became of them; empty while all is well."""
        ...


async def unless_lost(peers: Peers, work: Awaitable[None], then: str) -> None:
    """Do `work`, and give up when a peer is lost, also while `work` waits for it.

    Args:
        peers: looked at several times a second.
        work: cancelled then; a thread that it waits for is left behind.
        then: what happens next, for the last line.

    Raises:
        Fatal: names the peer.
        Exception: what `work` raised while nobody was lost.
    """
    working = asyncio.ensure_future(work)
    try:
        while not working.done() and not peers.reason:
            await asyncio.wait([working], timeout=_LOOK_S)
        if not peers.reason:
            return working.result()
    finally:
        working.cancel()
        cause = (await asyncio.gather(working, return_exceptions=True))[0]
    raise Fatal(f"{peers.reason}: {then}") from (
        cause if isinstance(cause, BaseException) else None
    )
