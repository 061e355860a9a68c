"""The process that has imported the environment once and forks itself for every episode.

`python -m services.env_agents.isolation.zygote FD`, started by `cells.py`; FD is a SEQPACKET
socket. In: the order (import path, options, limits), then `open` with one end of a socket pair
attached, and `kill`. Out: `ready` or `refused`, then `exited` for every episode's process. It has
one thread and no event loop, so that a fork copies nothing that runs.

An episode's process leads a session of its own and adopts its orphans; when it ends, its group is
killed, and whatever left the group becomes a child of this process and is killed as unknown. The
service's end, by whatever signal, ends this process, and that ends all of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import select
import signal
import socket
import sys
import time
from dataclasses import dataclass
from typing import Any, NoReturn, cast

import msgpack

from services.env_agents import loading
from services.env_agents.environment import Environment
from services.env_agents.isolation import cell
from services.env_agents.isolation.confinement import (
    CellLimits,
    adopt_orphans,
    children,
    confine,
    die_with_parent,
    more_descendants_than,
)
from shared.runtime.errors import ConfigError

MAX_PACKET = 1 << 20
"""Upper bound of one control message."""

WATCH_S = 0.2
"""How often the processes of every episode are counted."""


@dataclass(slots=True)
class _Child:
    """A live process of an episode."""

    cell_id: int
    why: str = ""
    """Why it was killed, once it was."""


class _Zygote:
    def __init__(
        self, control: socket.socket, make: type[Environment], order: dict[str, Any]
    ) -> None:
        self._control = control
        self._make = make
        self._options = cast("dict[str, Any]", order["options"])
        self._limits = CellLimits(**order["limits"])
        self._children: dict[int, _Child] = {}
        self._pid = os.getpid()
        self._woken, self._waker = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def run(self) -> None:
        """Serve until the service hangs up."""
        signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
        signal.set_wakeup_fd(self._waker, warn_on_full_buffer=False)
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        poll.register(self._woken, select.POLLIN)
        watch_at = 0.0
        while True:
            ready = {fd for fd, _ in poll.poll(WATCH_S * 1000 if self._children else None)}
            if self._woken in ready:
                with contextlib.suppress(BlockingIOError):
                    os.read(self._woken, 4096)
            self._reap()
            if self._control.fileno() in ready and not self._obey():
                return
            if self._children and time.monotonic() >= watch_at:
                watch_at = time.monotonic() + WATCH_S
                self._watch()

    def _obey(self) -> bool:
        """Perform one control message; False: the service is gone."""
        try:
            packet, fds, _, _ = socket.recv_fds(self._control, MAX_PACKET, 1)
        except ConnectionError:  # it closed before it had read all that we told it
            return False
        if not packet:
            return False
        message = cast("dict[str, Any]", msgpack.unpackb(packet))
        match message:
            case {"open": int(cell_id)} if len(fds) == 1:
                self._fork(cell_id, fds[0])
            case {"kill": int(cell_id), "why": str(why)}:
                for pid, child in self._children.items():
                    if child.cell_id == cell_id:
                        self._kill(pid, child, why)
            case _:
                raise AssertionError(f"no such order: {message}")
        return True

    def _fork(self, cell_id: int, fd: int) -> None:
        try:
            pid = os.fork()
        except OSError as error:
            os.close(fd)
            self._tell({"exited": cell_id, "why": f"could not be forked: {error}"})
            return
        if pid == 0:
            self._become(fd)
        os.close(fd)
        self._children[pid] = _Child(cell_id)

    def _become(self, fd: int) -> NoReturn:
        """Be the process of one episode."""
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.setsid()
            die_with_parent()
            if os.getppid() != self._pid:
                os._exit(1)
            adopt_orphans()
            self._control.close()
            os.close(self._woken)
            os.close(self._waker)
            _silence()
            if "numpy.random" in sys.modules:
                # random reseeds itself after a fork, numpy's global generator does not
                sys.modules["numpy.random"].seed()
            confine(self._limits)
            asyncio.run(
                cell.serve(
                    socket.socket(fileno=fd), lambda: self._make(self._options), self._limits
                )
            )
            status = 0
        finally:
            os._exit(status)

    def _kill(self, pid: int, child: _Child, why: str) -> None:
        child.why = child.why or why
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):  # before it led a group
            os.kill(pid, signal.SIGKILL)

    def _reap(self) -> None:
        """Collect who has ended, after killing what it leaves behind."""
        while True:
            try:
                # Not collected yet: its number still names its group and nobody else's.
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if ended is None:
                return
            pid = ended.si_pid
            child = self._children.pop(pid, None)
            if child is not None:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            self._kill_strangers()
            if child is not None:
                self._tell({"exited": child.cell_id, "why": child.why or _ending(ended)})

    def _kill_strangers(self) -> None:
        for pid in children(self._pid):
            if pid not in self._children:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def _watch(self) -> None:
        self._kill_strangers()
        bound = self._limits.processes
        for pid, child in self._children.items():
            if not child.why and more_descendants_than(pid, bound):
                self._kill(
                    pid, child, f"was killed: it started more than isolation.processes ({bound})"
                )

    def _tell(self, message: dict[str, Any]) -> None:
        try:
            self._control.send(cast(bytes, msgpack.packb(message)))
        except OSError:
            # The service is gone: the next read sees it.
            return


def _silence() -> None:
    """An environment's prints must not end up among the service's log lines."""
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    os.close(null)


def _ending(ended: Any) -> str:
    if ended.si_code == os.CLD_EXITED:
        return f"exited with status {ended.si_status}"
    try:
        name = signal.Signals(ended.si_status).name
    except ValueError:
        name = f"signal {ended.si_status}"
    return f"was ended by {name}"


def main(argv: list[str]) -> int:
    """Import the environment, report, serve."""
    die_with_parent()
    adopt_orphans()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the service's to handle
    control = socket.socket(fileno=int(argv[0]))
    order = cast("dict[str, Any]", msgpack.unpackb(control.recv(MAX_PACKET)))
    sys.path[:] = order["path"]
    try:
        make = loading.environment_class(order["environment"], order["options"])
    except ConfigError as error:
        control.send(cast(bytes, msgpack.packb({"refused": str(error)[:4000]})))
        return 2
    gc.collect()
    gc.freeze()  # what is imported stays shared between all episodes' processes
    ready = {"ready": os.getpid(), "acts": callable(getattr(make, "act", None))}
    control.send(cast(bytes, msgpack.packb(ready)))
    _Zygote(control, make, order).run()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
