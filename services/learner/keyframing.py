"""Full copies of the head beside its deltas, and the sweep of what dead publishers left."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from typing import Literal

from shared.runtime.bus import Bus
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


def keyframe_reason(*, due: bool, leases: Iterable[Lease], since_last_s: float) -> Reason | None:
    """Return why a keyframe of the head is to be published now, None when it is not. Pure.

    Args:
        due: enough versions since the last one.
        leases: of the live followers.
        since_last_s: since this process last published one.
    """
    if due:
        return "due"
    wanted = any(lease.gauges.get("keyframe_wanted") for lease in leases)
    return "wanted" if wanted and since_last_s > WANTED_PAUSE_S else None


class Keyframing:
    """Consumes leases and the publisher's count; produces keyframes; training goes on meanwhile."""

    def __init__(self, context: Context, publisher: Publisher, board: LeaseBoard) -> None:
        self._context = context
        self._bus: Bus = context.bus
        self._publisher = publisher
        self._board = board
        self._last = self._swept = self._not_before = float("-inf")
        self._pause_s = WANTED_PAUSE_S

    async def run(self) -> None:
        """Publish keyframes and sweep orphans until cancelled."""
        while True:
            # The sweep comes first: it frees the room that a keyframe may need.
            try:
                await self._sweep()
            except BusError as error:
                self._context.log.warning("sweep_failed", reason=str(error))
            if time.monotonic() >= self._not_before:
                try:
                    await self._keyframe()
                    self._pause_s = WANTED_PAUSE_S
                except BusError as error:
                    self._back_off(str(error))
            await asyncio.sleep(_POLL_S)

    def _back_off(self, reason: str) -> None:
        """Wait longer after each failure: every attempt uploads the whole model."""
        self._not_before = time.monotonic() + self._pause_s
        self._context.count("keyframes_failed")
        self._context.log.warning("keyframe_failed", reason=reason, next_try_s=self._pause_s)
        self._pause_s = min(2 * self._pause_s, MAX_PAUSE_S)

    async def _keyframe(self) -> None:
        now = time.monotonic()
        reason = keyframe_reason(
            due=self._publisher.keyframe_due,
            leases=[lease for role in FOLLOWING for lease in self._board.live(role)],
            since_last_s=now - self._last,
        )
        if reason is None:
            return
        self._last = now
        if await self._publisher.publish_keyframe(reason=reason) is not None:
            self._context.count(f"keyframes_{reason}")

    async def _sweep(self) -> None:
        now = time.monotonic()
        if now - self._swept < ORPHAN_AGE_S / 2:
            return
        self._swept = now
        self._context.count("orphans_swept", await self._publisher.sweep_orphans())
