"""Runs a program that nobody trusts: bounded time, memory, processes and output, no network.

What isolates it, and what does not, stands in docs/environments.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from services.env_agents.verifiers.sandbox_launcher import CANNOT

LAUNCHER = Path(__file__).with_name("sandbox_launcher.py")

LAST_BYTES_S = 5.0
"""After the kill; only a process that left its group, without isolation, holds the pipes longer."""

VISIBLE: tuple[str, ...] = ("/usr", "/bin", "/sbin", "/lib", "/lib64")
"""What programs need to run; beside them the folders of this Python."""


@dataclass(frozen=True, slots=True)
class SandboxLimits:
    """Of one run."""

    wall_s: float = 10.0
    cpu_s: float = 10.0
    """Of each process."""
    memory_mb: int = 512
    """Address space of each process."""
    processes: int = 16
    """At once; not enforced without isolation."""
    disk_mb: int = 64
    output_bytes: int = 1 << 20


@dataclass(frozen=True, slots=True)
class Ran:
    """How a run ended."""

    end: Literal["exited", "timeout", "output"]
    """`output`: it wrote more than allowed and was killed."""
    status: int
    """Exit status; 128 + signal. -1 unless it exited."""
    output: bytes
    errors: bytes
    """The first of stderr."""


class SandboxUnavailable(Exception):
    """This machine does not allow what isolates: one line, with the reason."""


class Sandbox:
    """Runs programs.

    Args:
        limits: of every run.
        isolate: False runs with resource limits alone: the program can read what this process
            can, write what its user can, and reach the network.
        concurrency: runs at once; further ones wait.

    Raises:
        SandboxUnavailable: isolation is asked for and this machine does not allow it.
    """

    def __init__(
        self, limits: SandboxLimits, *, isolate: bool = True, concurrency: int = 4
    ) -> None:
        self._limits = limits
        self._isolate = isolate
        self._concurrency = concurrency
        self._running = 0
        self._freed: list[asyncio.Future[None]] = []
        if isolate:
            reason = unavailable()
            if reason:
                raise SandboxUnavailable(reason)

    async def run(self, argv: Sequence[str], given: bytes) -> Ran:
        """Run a program with `given` on its stdin, to its end or its bounds.

        Raises:
            SandboxUnavailable: it could not be shut in.
        """
        async with self._place():
            process = await asyncio.create_subprocess_exec(
                *_launch(argv, self._limits, self._isolate),
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                start_new_session=True, cwd="/",
            )  # fmt: skip
            try:
                return await self._watch(process, given)
            finally:
                # The group: without isolation that is all there is to hold on to.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, 9)
                # To the end of its pipes, or their transports stay open.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LAST_BYTES_S):
                        await process.communicate()

    async def _watch(self, process: asyncio.subprocess.Process, given: bytes) -> Ran:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        output, errors = bytearray(), bytearray()
        end: Literal["exited", "timeout", "output"] = "exited"
        try:
            async with asyncio.timeout(self._limits.wall_s), asyncio.TaskGroup() as group:
                group.create_task(_feed(process.stdin, given))
                group.create_task(_collect(process.stdout, output, self._limits.output_bytes))
                group.create_task(_collect(process.stderr, errors, self._limits.output_bytes))
                group.create_task(_wait(process))
        except* TimeoutError:
            end = "timeout"
        except* _TooMuch:
            end = "output"
        status = process.returncode if end == "exited" else None
        if status == CANNOT:
            raise SandboxUnavailable(errors.decode(errors="replace").strip())
        if status is None:
            return Ran(end, -1, bytes(output), bytes(errors[:2000]))
        return Ran(end, 128 - status if status < 0 else status, bytes(output), bytes(errors[:2000]))

    @contextlib.asynccontextmanager
    async def _place(self) -> AsyncGenerator[None]:
        while self._running >= self._concurrency:
            freed = asyncio.get_running_loop().create_future()
            self._freed.append(freed)
            await freed
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1
            while self._freed:
                waiting = self._freed.pop(0)
                if not waiting.done():
                    waiting.set_result(None)
                    break


class _TooMuch(Exception):
    pass


async def _feed(stream: asyncio.StreamWriter, given: bytes) -> None:
    with contextlib.suppress(ConnectionError):
        stream.write(given)
        await stream.drain()
        stream.close()


async def _collect(stream: asyncio.StreamReader, into: bytearray, bound: int) -> None:
    while chunk := await stream.read(65536):
        into += chunk
        if len(into) > bound:
            del into[bound:]
            raise _TooMuch


async def _wait(process: asyncio.subprocess.Process) -> None:
    await process.wait()


def _launch(argv: Sequence[str], limits: SandboxLimits, isolate: bool) -> list[str]:
    order = {
        "argv": list(argv),
        "isolate": isolate,
        "memory_bytes": limits.memory_mb << 20,
        "processes": limits.processes,
        "cpu_s": limits.cpu_s,
        "disk_bytes": limits.disk_mb << 20,
        "visible": list(dict.fromkeys((*VISIBLE, sys.base_prefix, sys.prefix))),
    }
    return [sys.executable, "-I", "-S", str(LAUNCHER), json.dumps(order)]


@lru_cache(maxsize=1)
def unavailable() -> str:
    """Why isolation is not possible here, tried once; empty when it is."""
    if sys.platform != "linux":
        return "it needs Linux namespaces"
    argv = _launch([sys.executable, "-I", "-c", "print('in')"], SandboxLimits(), isolate=True)
    try:
        tried = subprocess.run(argv, capture_output=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"it could not be tried: {error}"
    if tried.stdout == b"in\n":
        return ""
    return tried.stderr.decode(errors="replace").strip() or f"status {tried.returncode}"
