"""How busy others kept the machine while something was measured."""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path

_STAT = Path("/proc/stat")


class OtherLoad:
    """Measures from its construction on; counts children that have ended as our own."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._busy_s = _busy_s()
        self._own_s = _own_s()

    def ratio(self) -> float:
        """Return the share of all cores that others used, 0..1; 0 where it is unknown."""
        wall_s = time.perf_counter() - self._started
        others_s = (_busy_s() - self._busy_s) - (_own_s() - self._own_s)
        return min(1.0, max(0.0, others_s / (wall_s * (os.cpu_count() or 1))))


def _busy_s() -> float:
    """Return the time that all cores were not idle, stolen time included."""
    if not _STAT.exists():
        return 0.0
    user, nice, system, _, _, irq, softirq, steal = _STAT.read_text().split(maxsplit=9)[1:9]
    ticks = sum(map(int, (user, nice, system, irq, softirq, steal)))
    return ticks / os.sysconf("SC_CLK_TCK")


def _own_s() -> float:
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    usages = [resource.getrusage(kind) for kind in kinds]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
