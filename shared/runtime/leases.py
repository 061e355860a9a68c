"""Who is alive: the latest lease of every pod, and when it ran out."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from shared.runtime.bus import Bus, CoreMessage, Subscription
from shared.wire.codec import decode
from shared.wire.errors import WireError
from shared.wire.telemetry import Lease, Role

STOPPED = "stopped"
"""Reason in the last lease of a pod that leaves on purpose: down at once."""

KEEP_EXPIRED = 50
"""Leases are forgotten after so many expiry times; scaled-down pods would pile up."""


@dataclass(frozen=True, slots=True)
class _Entry:
    lease: Lease
    heard_at: float


class LeaseTable:
    """The pure core: leases by (role, pod), aged by the hearer's clock, never the sender's."""

    def __init__(self, expiry_s: float) -> None:
        self._expiry_s = expiry_s
        self._entries: dict[tuple[str, str], _Entry] = {}
        self._floor = float("-inf")

    def hear(self, lease: Lease, now: float) -> None:
        """Take in a lease; the latest heard of a pod counts."""
        self._entries[lease.role, lease.pod] = _Entry(lease, now)

    def forgive(self, now: float) -> None:
        """Start every pod's time anew: we were deaf until now, they need not have been silent."""
        self._floor = now

    def live(self, role: Role, now: float) -> list[Lease]:
        """Leases of a role that have not run out, by pod name."""
        return [
            entry.lease
            for (of, _), entry in sorted(self._entries.items())
            if of == role
            and entry.lease.reason != STOPPED
            and now - max(entry.heard_at, self._floor) < self._expiry_s
        ]

    def latest(self, now: float) -> list[Lease]:
        """Every pod's last lease, run out or not; long silent pods are forgotten."""
        bound = KEEP_EXPIRED * self._expiry_s
        self._entries = {
            key: entry for key, entry in self._entries.items() if now - entry.heard_at < bound
        }
        return [entry.lease for _, entry in sorted(self._entries.items())]


class LeaseBoard:
    """A LeaseTable that listens. While the bus is away nobody's lease runs out."""

    def __init__(
        self, bus: Bus, expiry_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._bus = bus
        self._clock = clock
        self._table = LeaseTable(expiry_s)
        self._subscription: Subscription | None = None
        self._heard_until = clock()
        self._reconnects = bus.counters["reconnects"]

    async def start(self) -> None:
        """Listen from now on; the first picture is complete after one lease interval."""
        self._subscription = await self._bus.subscribe(self._bus.subjects.leases, self._hear)

    async def close(self) -> None:
        if self._subscription is not None:
            await self._subscription.close()

    def live(self, role: Role) -> list[Lease]:
        """Leases of a role that have not run out."""
        return self._table.live(role, self._now())

    def latest(self) -> list[Lease]:
        """Every pod's last lease, run out or not."""
        return self._table.latest(self._now())

    def _now(self) -> float:
        """The clock, standing still while the bus is away."""
        if self._bus.connected:
            now = self._clock()
            if self._bus.counters["reconnects"] != self._reconnects:
                self._reconnects = self._bus.counters["reconnects"]
                self._table.forgive(now)
            self._heard_until = now
        return self._heard_until

    async def _hear(self, message: CoreMessage) -> None:
        try:
            lease = decode(message.payload, Lease)
        except WireError:
            self._bus.counters["unreadable_leases"] += 1
            return
        self._table.hear(lease, self._clock())
