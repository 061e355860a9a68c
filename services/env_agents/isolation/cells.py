"""The service's side: opens, watches and kills the processes of episodes."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import msgpack

from services.env_agents.config import IsolationSection
from services.env_agents.environment import EnvironmentLost
from services.env_agents.isolation.confinement import CellLimits
from services.env_agents.isolation.zygote import MAX_PACKET
from shared.runtime.context import Context
from shared.runtime.errors import ConfigError

LAST_WORDS_S = 2.0
"""From the end of a connection to the word how its process ended."""


@dataclass(eq=False, slots=True)
class Cell:
    """The process of one episode, seen from the service."""

    cell_id: int
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    ended: asyncio.Future[str] = field(default_factory=asyncio.Future[str])
    """How its process ended."""

    async def ending(self) -> str:
        """Return how it ended, as the rest of a sentence."""
        try:
            async with asyncio.timeout(LAST_WORDS_S):
                return await asyncio.shield(self.ended)
        except TimeoutError:
            return "hung up"


class Cells:
    """All episodes' processes of one service, forked from one zygote.

    Args:
        context: counters and log.
        environment: import path of the Environment.
        options: `task.options`.
        section: limits and bounds.
    """

    def __init__(
        self,
        context: Context,
        environment: str,
        options: Mapping[str, Any],
        section: IsolationSection,
    ) -> None:
        self._context = context
        self._section = section
        self._order = {
            "environment": environment,
            "options": dict(options),
            "limits": asdict(self.limits),
        }
        self._starting = asyncio.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self.acts = False
        """The environment reads parsed answers (`act`); known once started."""
        self._next_id = 0
        self._open: dict[int, Cell] = {}

    @property
    def limits(self) -> CellLimits:
        section = self._section
        return CellLimits(
            memory_bytes=section.memory_mb << 20,
            processes=section.processes,
            cpu_s=section.cpu_s,
            max_message_bytes=section.max_message_bytes,
        )

    @property
    def zygote_pid(self) -> int | None:
        """Process id of the zygote while it lives."""
        return self._process.pid if self._process is not None and self._control else None

    async def start(self) -> None:
        """Start the zygote and wait until it has imported the environment.

        Raises:
            ConfigError: not on Linux, or the environment cannot be used.
        """
        if sys.platform != "linux":
            raise ConfigError(
                "env_agents.isolation.mode process: needs Linux (prctl, /proc); "
                "use none for environments you trust"
            )
        await self._end_process()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        with theirs:
            self._process = subprocess.Popen(  # noqa: ASYNC220 - returns once the child exists
                [sys.executable, "-m", __name__.replace("cells", "zygote"), str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
            )
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._section.start_timeout_s):
                order = cast(bytes, msgpack.packb({**self._order, "path": sys.path}))
                await loop.sock_sendall(ours, order)
                packet = await loop.sock_recv(ours, MAX_PACKET)
        except (TimeoutError, OSError) as error:
            await self._end_process()
            ours.close()
            raise ConfigError(
                f"task.environment {self._order['environment']}: its process was not ready within "
                f"isolation.start_timeout_s ({self._section.start_timeout_s:g} s)"
            ) from error
        answer = cast("dict[str, Any]", msgpack.unpackb(packet)) if packet else {}
        if "ready" not in answer:
            await self._end_process()
            ours.close()
            raise ConfigError(
                answer.get("refused")
                or f"task.environment {self._order['environment']}: importing it ended the process"
            )
        self.acts = bool(answer["acts"])
        self._control = ours
        loop.add_reader(ours, self._hear)

    async def open(self) -> Cell:
        """Fork a process for one episode.

        Raises:
            EnvironmentLost: the zygote is gone and cannot be started again.
        """
        async with self._starting:
            if self._control is None:
                self._context.count("isolation_restarts")
                try:
                    await self.start()
                except ConfigError as error:
                    raise EnvironmentLost(str(error)) from error
        ours, theirs = socket.socketpair()
        with theirs:
            reader, writer = await asyncio.open_connection(sock=ours)
            self._next_id += 1
            cell = Cell(self._next_id, reader, writer)
            self._open[cell.cell_id] = cell
            try:
                await self._send({"open": cell.cell_id}, theirs.fileno())
            except OSError as error:
                self._open.pop(cell.cell_id, None)
                writer.close()
                raise EnvironmentLost(f"no process could be forked: {error}") from error
        return cell

    async def close(self, cell: Cell, why: str) -> None:
        """Hang up and kill what is left."""
        cell.writer.close()
        if cell.ended.done():
            return
        try:
            await self._send({"kill": cell.cell_id, "why": why})
        except OSError:
            return  # the zygote is gone, and its children with it

    async def stop(self) -> None:
        """End the zygote and with it every episode's process; open episodes are lost."""
        self._hang_up()
        await self._end_process()

    async def _send(self, message: dict[str, Any], fd: int | None = None) -> None:
        packet = cast(bytes, msgpack.packb(message))
        async with asyncio.timeout(self._section.start_timeout_s):
            while True:
                if self._control is None:
                    raise ConnectionError("the process that forks is gone")
                try:
                    socket.send_fds(self._control, [packet], [] if fd is None else [fd])
                except BlockingIOError:
                    await asyncio.sleep(0.005)  # many at once fill the socket
                else:
                    return

    def _hear(self) -> None:
        """Take one message of the zygote; called by the event loop."""
        assert self._control is not None, "only while connected"
        try:
            packet = self._control.recv(MAX_PACKET)
        except BlockingIOError:
            return
        except OSError:
            packet = b""
        if not packet:
            self._context.log.warning("isolation_lost", open=len(self._open))
            self._hang_up()
            return
        message = cast("dict[str, Any]", msgpack.unpackb(packet))
        cell = self._open.pop(message["exited"], None)
        if cell is not None and not cell.ended.done():
            cell.ended.set_result(message["why"])

    def _hang_up(self) -> None:
        control, self._control = self._control, None
        if control is None:
            return
        asyncio.get_running_loop().remove_reader(control)
        control.close()
        for cell in self._open.values():
            cell.writer.close()
            if not cell.ended.done():
                cell.ended.set_result("ended with the process that forks them")
        self._open.clear()

    async def _end_process(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        try:
            await asyncio.to_thread(process.wait, 1.0)
        except subprocess.TimeoutExpired:
            process.kill()
            await asyncio.to_thread(process.wait)
