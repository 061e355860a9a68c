"""Full copies of the head beside its deltas, and the sweep of what nobody names any more."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from typing import Literal

from services.learner.blob_sweep import BlobSweep
from shared.runtime.context import Context
from shared.runtime.errors import BusError
from shared.runtime.leases import LeaseBoard
from shared.weights.orphans import ORPHAN_AGE_S
from shared.weights.publisher import Publisher
from shared.wire.telemetry import Lease, Role

_POLL_S = 0.5
WANTED_PAUSE_S = 10.0
"""A follower that asked keeps asking until it has read the new keyframe; not one for each lease."""

MAX_PAUSE_S = 600.0
"""Longest pause after keyframes that failed."""

FOLLOWING: tuple[Role, ...] = ("rollout", "logit_oracle")

Reason = Literal["due", "wanted"]


def keyframe_reason(*, due: bool, wanted: bool, since_last_s: float) -> Reason | None:
    """Return why a keyframe of the head is to be published now, None when it is not. Pure.

    Args:
        due: enough versions since the last one.
        wanted: a follower has no way left.
        since_last_s: since this process last published one.
    """
    if due:
        return "due"
    return "wanted" if wanted and since_last_s > WANTED_PAUSE_S else None


def asks(leases: Iterable[Lease]) -> bool:
    """Return whether one of the followers asks for a keyframe in its lease."""
    return any(lease.gauges.get("keyframe_wanted") for lease in leases)


class Keyframing:
    """Consumes leases and the publisher's count; produces keyframes; training goes on meanwhile."""

    def __init__(
        self,
        context: Context,
        publisher: Publisher,
        board: LeaseBoard,
        *,
        own_wants: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Watch over `publisher`.

        Args:
            context: counters and log.
            publisher: of the versions.
            board: leases of the followers elsewhere.
            own_wants: whether a follower of this process, which has no lease, asks for a keyframe.
            clock: seconds.
        """
        self._context = context
        self._publisher = publisher
        self._board = board
        self._own_wants = own_wants
        self._blobs = BlobSweep(context.bus)
        self._clock = clock
        self._last = self._swept = self._not_before = float("-inf")
        self._pause_s = WANTED_PAUSE_S

    async def run(self) -> None:
        """Publish keyframes and sweep orphans until cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(_POLL_S)

    async def look(self) -> None:
        """Do what is to be done now; what the bus or the store refuses is done later."""
        # The sweep comes first: it frees the room that a keyframe may need.
        try:
            await self._sweep()
        except BusError as error:
            self._context.log.warning("sweep_failed", reason=str(error))
        if self._clock() < self._not_before:
            return
        try:
            await self._keyframe()
        except BusError as error:
            self._back_off(str(error))

    def _back_off(self, reason: str) -> None:
        """Wait longer after each failure: every attempt uploads the whole model."""
        self._not_before = self._clock() + self._pause_s
        self._context.count("keyframes_failed")
        self._context.log.warning("keyframe_failed", reason=reason, next_try_s=self._pause_s)
        self._pause_s = min(2 * self._pause_s, MAX_PAUSE_S)

    async def _keyframe(self) -> None:
        now = self._clock()
        leases = [lease for role in FOLLOWING for lease in self._board.live(role)]
        reason = keyframe_reason(
            due=self._publisher.keyframe_due,
            wanted=asks(leases) or self._own_wants(),
            since_last_s=now - self._last,
        )
        if reason is None:
            return
        if await self._publisher.publish_keyframe(reason=reason) is not None:
            self._context.count(f"keyframes_{reason}")
        self._last = now
        self._pause_s = WANTED_PAUSE_S

    async def _sweep(self) -> None:
        now = self._clock()
        if now - self._swept < ORPHAN_AGE_S / 2:
            return
        self._swept = now
        self._context.count("orphans_swept", await self._publisher.sweep_orphans())
        self._context.count("blobs_swept", await self._blobs.sweep(time.time() - ORPHAN_AGE_S))
