"""Who is alive: the newest lease of every pod."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from shared.runtime.bus import Bus, CoreMessage, Subscription
from shared.wire.codec import decode
from shared.wire.errors import WireError
from shared.wire.telemetry import Lease, Role


@dataclass
class Leases:
    """Newest lease by (role, pod). Pure: the receiver's clock is handed in.

    Expiry counts from the moment a lease was *received*: the sender's clock may be off.
    """

    expiry_s: float
    _held: dict[tuple[str, str], tuple[float, Lease]] = field(
        default_factory=dict[tuple[str, str], tuple[float, Lease]]
    )

    def receive(self, lease: Lease, now: float) -> None:
        """Keep a lease unless it is older than the one held of the same process."""
        key = (lease.role, lease.pod)
        held = self._held.get(key)
        older = held is not None and (
            held[1].incarnation == lease.incarnation and held[1].sent_at > lease.sent_at
        )
        if not older:
            self._held[key] = (now, lease)

    def latest(self) -> list[Lease]:
        """Return the newest lease of every pod ever seen, expired ones included."""
        return [lease for _, lease in self._held.values()]

    def live(self, role: Role, now: float) -> list[Lease]:
        """Return the leases of a role that have not expired."""
        return [
            lease
            for received, lease in self._held.values()
            if lease.role == role and now - received <= self.expiry_s
        ]


class LeaseBoard:
    """Leases as they come in over the bus."""

    def __init__(
        self, bus: Bus, expiry_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._bus = bus
        self._clock = clock
        self._leases = Leases(expiry_s)
        self._subscription: Subscription | None = None

    async def start(self) -> None:
        """Subscribe to all leases of the run."""
        self._subscription = await self._bus.subscribe(self._bus.subjects.leases, self._receive)

    async def close(self) -> None:
        if self._subscription is not None:
            await self._subscription.close()

    def latest(self) -> list[Lease]:
        """Return the newest lease of every pod ever seen."""
        return self._leases.latest()

    def live(self, role: Role) -> list[Lease]:
        """Return the leases of a role that have not expired."""
        return self._leases.live(role, self._clock())

    async def _receive(self, message: CoreMessage) -> None:
        try:
            lease = decode(message.payload, Lease)
        except WireError:
            return  # a lease from another major: that pod counts as not there
        self._leases.receive(lease, self._clock())
