"""How busy each process was, and what it counted, from the leases of a run. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from shared.wire.telemetry import Lease

ROLE_ORDER = ("learner", "rollout", "env_agents", "logit_oracle")


@dataclass(frozen=True)
class Life:
    """One incarnation of one process: its leases in order."""

    role: str
    pod: str
    leases: tuple[Lease, ...]

    @property
    def wall_s(self) -> float:
        return self.leases[-1].sent_at - self.leases[0].sent_at

    @property
    def busy_s(self) -> float:
        return self.leases[-1].busy_s - self.leases[0].busy_s

    def counted(self, name: str) -> float:
        """Return the last value of a counter, 0 when it was never sent."""
        return self.leases[-1].counters.get(name, 0.0)


def lives(leases: Iterable[Lease]) -> tuple[Life, ...]:
    """Group leases by process incarnation, in order of role, pod and start."""
    grouped: dict[tuple[str, str, str], list[Lease]] = {}
    for lease in leases:
        grouped.setdefault((lease.role, lease.pod, lease.incarnation), []).append(lease)
    ordered = [
        Life(role, pod, tuple(sorted(sent, key=lambda lease: lease.sent_at)))
        for (role, pod, _), sent in grouped.items()
    ]
    return tuple(
        sorted(ordered, key=lambda x: (_rank(x.role), x.pod, x.leases[0].sent_at)),
    )


def busy_shares(of: Sequence[Life]) -> dict[str, float]:
    """Return the busy share of each role: own work over wall time, over all its incarnations."""
    shares: dict[str, float] = {}
    for role in dict.fromkeys(life.role for life in of):
        wall_s = sum(life.wall_s for life in of if life.role == role)
        busy_s = sum(life.busy_s for life in of if life.role == role)
        shares[role] = busy_s / wall_s if wall_s > 0 else 0.0
    return shares


def total(of: Sequence[Life], role: str, *names: str) -> float:
    """Return a counter summed over a role's incarnations; `names` are spellings of one counter."""
    return sum(max(life.counted(name) for name in names) for life in of if life.role == role)


def rate(of: Sequence[Life], role: str, *names: str) -> float:
    """Return a counter per second, between its first and its last rise in any of the processes."""
    rises = [
        (before.sent_at, after.sent_at)
        for life in of
        if life.role == role
        for before, after in pairwise(life.leases)
        if any(after.counters.get(n, 0.0) > before.counters.get(n, 0.0) for n in names)
    ]
    if not rises:
        return 0.0
    wall_s = max(stop for _, stop in rises) - min(start for start, _ in rises)
    return total(of, role, *names) / wall_s


@dataclass(frozen=True)
class BusyGrid:
    """Busy share of every pod in equal intervals; rows are pods, NaN where it did not live."""

    pods: tuple[str, ...]
    edges: npt.NDArray[np.float64]
    """[n + 1], Unix seconds."""
    shares: npt.NDArray[np.float64]
    """[pods, n]."""


def busy_grid(of: Sequence[Life], interval_s: float) -> BusyGrid | None:
    """Resample busy seconds onto a grid; None without two leases of any process."""
    of = [life for life in of if len(life.leases) > 1]
    if not of:
        return None
    start = min(life.leases[0].sent_at for life in of)
    stop = max(life.leases[-1].sent_at for life in of)
    count = max(1, round((stop - start) / interval_s))
    edges: npt.NDArray[np.float64] = np.linspace(start, start + count * interval_s, count + 1)
    pods = tuple(dict.fromkeys(life.pod for life in of))
    shares = np.full((len(pods), len(edges) - 1), np.nan)
    for life in of:
        at = np.array([lease.sent_at for lease in life.leases])
        busy = np.array([lease.busy_s for lease in life.leases])
        row = shares[pods.index(life.pod)]
        lived = np.diff(np.clip(edges, at[0], at[-1]))
        own = np.diff(np.interp(edges, at, busy))
        here = lived > interval_s / 4
        # Where one incarnation follows another within an interval, the longer-lived part counts.
        row[here] = np.where(np.isnan(row[here]), own[here] / lived[here], row[here])
    return BusyGrid(pods, edges, np.clip(shares, 0.0, 1.0))


def _rank(role: str) -> int:
    return ROLE_ORDER.index(role) if role in ROLE_ORDER else len(ROLE_ORDER)
