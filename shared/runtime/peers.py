"""Work that depends on further processes of the same job."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Protocol

from shared.runtime.errors import ConfigError, Fatal, Fenced
from shared.runtime.service import cause_of

_LOOK_S = 0.1
_OWN_WORDS_S = 1.0
"""What `work` itself knows of the failure (a full disk) comes so soon, or it waits for the peer."""


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
        Exception: what `work` raised while nobody was lost, or said on purpose all the same.
    """
    working = asyncio.ensure_future(work)
    try:
        while not working.done() and not peers.reason:
            await asyncio.wait([working], timeout=_LOOK_S)
        if not peers.reason:
            return working.result()
        await asyncio.wait([working], timeout=_OWN_WORDS_S)
    finally:
        working.cancel()
        cause = (await asyncio.gather(working, return_exceptions=True))[0]
    if isinstance(cause, Exception) and isinstance(cause_of(cause), ConfigError | Fatal | Fenced):
        raise cause
    raise Fatal(f"{peers.reason}: {then}") from (
        cause if isinstance(cause, BaseException) else None
    )
