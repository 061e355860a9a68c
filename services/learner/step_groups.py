"""What a step begins with: complete groups, once they are there and may be taken.

Consumes the desk; waits until a batch is complete and, with a fence, until all that the present
version sampled is scored; unblocked by arrivals and the stop signal; produces groups.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from services.learner.desk import Desk
from services.learner.fencing import FenceReport, Fencing
from services.learner.staging import CompleteGroup

_RECHECK_S = 0.5


class StepGroups:
    """Waits for the groups of each step.

    Args:
        desk: where they become complete.
        fencing: of a route that needs a fence before a step.
        stop: ends the waiting.
        drops_stale: groups that are too old leave first (`admission.on_stale`).
        settle: called whenever something has changed.
    """

    def __init__(
        self,
        desk: Desk,
        fencing: Fencing | None,
        stop: asyncio.Event,
        *,
        drops_stale: bool,
        settle: Callable[[], None],
    ) -> None:
        self._desk = desk
        self._fencing = fencing
        self._stop = stop
        self._drops_stale = drops_stale
        self._settle = settle
        self.wait_s = 0.0
        """Of the newest groups."""
        self.fence_report: FenceReport | None = None
        """Of the newest fence."""

    async def next(self, version: int, digest: str) -> list[CompleteGroup]:
        """Return the groups of the step that leaves a version; none: stopped.

        Args:
            version: the present one.
            digest: of its bytes.
        """
        waiting_since = time.perf_counter()
        while not self._stop.is_set():
            self._desk.changed.clear()
            self._settle()
            if self._drops_stale:
                await self._desk.drop_stale()
            groups = await self._ready(version, digest)
            if groups:
                self.wait_s = time.perf_counter() - waiting_since
                return groups
            await self._changed_or_stopped()
        return []

    async def _ready(self, version: int, digest: str) -> list[CompleteGroup]:
        if self._fencing is None:
            return self._desk.next_groups()
        return await self._fenced(self._fencing, version, digest)

    async def _fenced(self, fencing: Fencing, version: int, digest: str) -> list[CompleteGroup]:
        """Have everything scored that this version sampled before a step may leave it."""
        if not self._desk.batch_is_played():
            return []
        self.fence_report = await fencing.run(version, digest)
        groups = self._desk.next_groups() if self.fence_report else []
        if not groups:
            await fencing.lower(version)
        return groups

    async def _changed_or_stopped(self) -> None:
        changed = asyncio.ensure_future(self._desk.changed.wait())
        stopped = asyncio.ensure_future(self._stop.wait())
        try:
            # The bound: several waiters share the event, and one may clear it for another.
            await asyncio.wait(
                (changed, stopped), timeout=_RECHECK_S, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            changed.cancel()
            stopped.cancel()
