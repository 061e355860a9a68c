"""The env agents' side of the fence: a new generation in, partials and an acknowledgement out.

Watch: consumes the control document, polled and as a core message; waits for a new generation;
produces interruptions, then one partial per episode with tokens nobody has scored yet, then the
acknowledgement: gauge `fence_generation` of the lease. From then on this process takes no token
below the floor from anybody, so that the learner may leave the version behind.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from services.env_agents.gate import Gate
from services.env_agents.sampler_client import SamplerClient
from shared.runtime.bus import CoreMessage, Subscription
from shared.runtime.context import Context
from shared.runtime.errors import PayloadTooLarge
from shared.wire.codec import decode, encode
from shared.wire.errors import WireError
from shared.wire.fencing import FENCE_GENERATION, FENCE_INTERRUPTED, PartialTrajectory
from shared.wire.weights import Control

_POLL_S = 0.2
_WINDOW = 32
"""Appends in flight."""

Collect = Callable[[int, int], Sequence[PartialTrajectory]]
"""(generation, floor) -> what is to be handed in."""


class Fencing:
    """Watches the control document for the length of the process.

    Args:
        context: bus, gauges and log.
        gate: holds requests back; heard by the sampler client.
        sampler: whose requests are interrupted.
        bound_s: a rollout that does not give back an interrupted request within it is given up.
    """

    def __init__(
        self, context: Context, gate: Gate, sampler: SamplerClient, *, bound_s: float
    ) -> None:
        self._context = context
        self._gate = gate
        self._sampler = sampler
        self._bound_s = bound_s
        self._news = asyncio.Event()
        self._subscription: Subscription | None = None

    async def start(self) -> None:
        """Know the floor before the first request; nothing is in play, so this acknowledges."""
        bus = self._context.bus
        self._subscription = await bus.subscribe(bus.subjects.control, self._hear)
        await self._read()
        self._acknowledge(self._gate.generation, 0)

    async def close(self) -> None:
        if self._subscription is not None:
            await self._subscription.close()

    async def run(self, collect: Collect) -> None:
        """Perform every new generation, for ever."""
        acknowledged = self._context.gauges[FENCE_GENERATION]
        while True:
            try:
                async with asyncio.timeout(_POLL_S):
                    await self._news.wait()
            except TimeoutError:
                await self._read()
            self._news.clear()
            generation, floor = self._gate.generation, self._gate.min_version
            if generation > acknowledged:
                await self._perform(generation, floor, collect)
                acknowledged = generation

    async def _perform(self, generation: int, floor: int, collect: Collect) -> None:
        interrupted = await self._sampler.interrupt(floor, self._bound_s)
        partials = collect(generation, floor)
        window = asyncio.Semaphore(_WINDOW)
        async with asyncio.TaskGroup() as group:
            for partial in partials:
                group.create_task(self._store(partial, window))
        self._context.count("interrupted_turns", interrupted)
        self._context.count("partials", len(partials))
        self._acknowledge(generation, interrupted)
        self._context.log.debug(
            "fenced",
            generation=generation,
            floor=floor,
            interrupted=interrupted,
            partials=len(partials),
        )

    async def _store(self, partial: PartialTrajectory, window: asyncio.Semaphore) -> None:
        async with window:
            bus = self._context.bus
            try:
                await bus.append(bus.subjects.partial(partial.ticket_id), encode(partial))
            except PayloadTooLarge as error:
                # Its terminal will be too large, too, and end the ticket as failed.
                self._context.count("partials_too_large")
                self._context.log.warning(
                    "partial_too_large", ticket_id=partial.ticket_id, reason=str(error)
                )

    def _acknowledge(self, generation: int, interrupted: int) -> None:
        self._context.gauges[FENCE_GENERATION] = float(generation)
        self._context.gauges[FENCE_INTERRUPTED] = float(interrupted)
        self._context.lease_due.set()

    # --- the document
    async def _read(self) -> None:
        payload = await self._context.bus.get_control("control")
        if payload is not None:
            self._take(payload)

    async def _hear(self, message: CoreMessage) -> None:
        self._take(message.payload)

    def _take(self, payload: bytes) -> None:
        try:
            control = decode(payload, Control)
        except WireError as error:
            self._context.count("unreadable_controls")
            self._context.log.warning("control_unreadable", reason=str(error))
            return
        if self._gate.hear(control):
            self._news.set()
