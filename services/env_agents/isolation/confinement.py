"""What a process of an environment may use, and how the kernel is told. Linux."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

RESERVE_BYTES = 4 << 20
"""Address space kept back until the limit was hit, so that there is room to say so."""

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True, slots=True)
class CellLimits:
    """Of one episode's process."""

    memory_bytes: int
    """Address space beyond what the environment's import took, each process for itself."""
    processes: int
    """Processes that it may start, descendants included."""
    cpu_s: float
    """CPU time of each process; 0: unbounded."""
    max_message_bytes: int
    """One observation or answer."""


def die_with_parent() -> None:
    """End this process by SIGKILL as soon as the thread that started it ends."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent ends: none escapes by daemonising."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def confine(limits: CellLimits) -> None:
    """Set the resource limits of this process and of all that it starts."""
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    _lower(resource.RLIMIT_AS, held + limits.memory_bytes, RESERVE_BYTES)
    _lower(resource.RLIMIT_CORE, 0)
    if limits.cpu_s:
        _lower(resource.RLIMIT_CPU, max(1, round(limits.cpu_s)))


def release_reserve() -> None:
    """Allow what was kept back, after the environment has used up its own."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))


def children(pid: int) -> Iterator[int]:
    """Pids of the children of a process; none when it is gone."""
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return
    for thread in threads:
        try:
            listed = Path(f"/proc/{pid}/task/{thread}/children").read_text()
        except OSError:
            continue
        yield from map(int, listed.split())


def more_descendants_than(pid: int, bound: int) -> bool:
    """Has the process more than `bound` descendants? Counts no further than needed."""
    found = 0
    pending = [pid]
    while pending:
        for child in children(pending.pop()):
            found += 1
            if found > bound:
                return True
            pending.append(child)
    return False


def _lower(what: int, value: int, reserve: int = 0) -> None:
    _, hard = resource.getrlimit(what)
    bound = value + reserve
    if hard != resource.RLIM_INFINITY:
        bound = min(bound, hard)
    resource.setrlimit(what, (bound - reserve, bound))


def _prctl(option: int, argument: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, argument, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option})")
