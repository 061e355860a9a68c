"""What the runtime hands to a service: identity, bus, health, lease state, stop signal."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry

from shared.runtime.bus import Bus
from shared.runtime.logs import Log
from shared.runtime.signals import unless_stopped
from shared.wire.telemetry import Lease, Role


@dataclass
class Health:
    """What `/readyz` says, and why."""

    reason: str = "starting"
    """Empty when ready."""

    @property
    def ready(self) -> bool:
        return not self.reason

    def set_ready(self) -> None:
        self.reason = ""

    def set_unready(self, reason: str) -> None:
        self.reason = reason


@dataclass
class Context:
    """One running service process. `launch` builds it; tests build it around a MemoryBus."""

    role: Role
    pod: str
    """Unique among the live processes of a role; usable in a subject."""
    incarnation: str
    """Unique per process start."""
    bus: Bus
    log: Log
    registry: CollectorRegistry = field(default_factory=CollectorRegistry)
    health: Health = field(default_factory=Health)
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    """Set by SIGTERM or SIGINT: stop pulling, finish or interrupt, drain, return."""
    lease_due: asyncio.Event = field(default_factory=asyncio.Event)
    """Set to renew the lease at once."""
    version: int = -1
    counters: dict[str, float] = field(default_factory=dict[str, float])
    gauges: dict[str, float] = field(default_factory=dict[str, float])
    measured: dict[str, float] = field(default_factory=dict[str, float])
    """Gauges for Prometheus alone: leases do not carry them."""
    labelled: dict[tuple[str, str], dict[str, float]] = field(
        default_factory=dict[tuple[str, str], dict[str, float]]
    )
    """The same with one label of bounded values: (name, label) -> value by label value."""
    busy_s: float = 0.0

    def count(self, name: str, amount: float = 1.0) -> None:
        """Add to a monotonic counter that leases carry."""
        self.counters[name] = self.counters.get(name, 0.0) + amount

    def set_version(self, version: int) -> None:
        """Announce the policy version held, at once."""
        self.version = version
        self.lease_due.set()

    async def streams_exist(self, timeout_s: float) -> bool:
        """Wait until the learner has created the streams; False when the stop signal came first.

        Raises:
            BusUnavailable: they do not exist after `timeout_s`, or the bus does not answer.
        """

        async def wait() -> bool:
            await self.bus.wait_for_streams(timeout_s)
            return True

        return await unless_stopped(self.stop, wait()) is not None

    @contextmanager
    def busy(self) -> Generator[None, None, None]:
        """Count the enclosed time as own work (not waiting)."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.busy_s += time.perf_counter() - started

    def lease(self, pid: int) -> Lease:
        """Build the lease to publish now."""
        return Lease(
            role=self.role,
            pod=self.pod,
            incarnation=self.incarnation,
            pid=pid,
            sent_at=time.time(),
            ready=self.health.ready,
            reason=self.health.reason,
            version=self.version,
            counters=dict(self.counters),
            gauges=dict(self.gauges),
            busy_s=self.busy_s,
        )
