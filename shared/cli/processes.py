"""Child processes that cannot outlive the supervisor, their logs and their memory."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

QUIET_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "MALLOC_ARENA_MAX": "2",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128",
    "GOMEMLIMIT": "128MiB",
}
"""Without one thread per process, generation collapses when processes share cores. The last three
bound memory on a laptop: glibc's arenas, kernels kept per shape, and nats-server's heap (a soft
limit for its garbage collector)."""

_SETTINGS = "LAGWISE_"
_RANK = frozenset(
    {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
)
"""Of a launcher that started us; ranks of a service are started by one of their own."""

# Linux: the kernel kills us when the parent thread dies, and the wish survives execve. It is made
# in a process of its own because preexec_fn is unsafe with threads. The parent may have died
# before the wish: hence the second look at getppid.
_DIE_WITH_PARENT = """
import os, sys
parent = int(sys.argv[1])
if sys.platform == "linux":
    import ctypes
    ctypes.CDLL(None).prctl(1, 9)
if os.getppid() != parent:
    os._exit(127)
os.execvp(sys.argv[2], sys.argv[2:])
"""


def child_environment(
    environ: Mapping[str, str], extra: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Return a child's environment: ours, one thread, and no setting twice.

    `LAGWISE_A__B` settings are already in the resolved configuration. A thread count that the
    user set wins.
    """
    kept = {
        name: value
        for name, value in environ.items()
        if not (name.startswith(_SETTINGS) and "__" in name) and name not in _RANK
    }
    return {**QUIET_ENVIRONMENT, **kept, **(extra or {})}


def dying_with_us(argv: Sequence[str]) -> list[str]:
    """Return the command of a child that dies with the thread that starts it.

    That is to be the main thread: Linux ties the child's life to the calling thread.
    """
    return [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid()), *argv]


async def spawn(
    argv: Sequence[str], log_path: Path, environ: Mapping[str, str]
) -> asyncio.subprocess.Process:
    """Start a process in a session of its own that dies with us; output is appended to its log.

    Must be called on the main thread (`dying_with_us`).

    Raises:
        OSError: the interpreter or the log file.
    """
    log_path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        return await asyncio.create_subprocess_exec(
            *dying_with_us(argv),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=descriptor,
            stderr=descriptor,
            env=dict(environ),
            start_new_session=True,
        )
    finally:
        os.close(descriptor)


def last_line(log_path: Path, start: int = 0, bound_bytes: int = 16384) -> str:
    """Return the last non-empty line written after byte `start`; empty when there is none.

    Our own JSON lines are shortened to their error or event.
    """
    try:
        with log_path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(start, size - bound_bytes))
            tail = file.read()
    except OSError:
        return ""
    lines = [line for line in tail.decode(errors="replace").splitlines() if line.strip()]
    return _plain(lines[-1].strip()) if lines else ""


def log_size(log_path: Path) -> int:
    """Return the size of a log in bytes, 0 when it does not exist."""
    try:
        return log_path.stat().st_size
    except OSError:
        return 0


def summed_pss_bytes(own_pid: int) -> int:
    """Return proportional set size, summed over a process and all its descendants.

    Falls back to unique set size where the system keeps no PSS.
    """
    own = psutil.Process(own_pid)
    return sum(_pss_bytes(process) for process in [own, *own.children(recursive=True)])


def _pss_bytes(process: psutil.Process) -> int:
    with suppress(psutil.Error, OSError):
        memory = process.memory_full_info()
        return int(getattr(memory, "pss", 0) or memory.uss)
    return 0


def _plain(line: str) -> str:
    try:
        fields = json.loads(line)
    except ValueError:
        return line[:500]
    if not isinstance(fields, dict):
        return line[:500]
    said: Iterable[object] = (fields.get(key) for key in ("reason", "error", "event"))
    return next((str(text) for text in said if text), line)[:500]
