"""The supervisor's shell: starts processes, waits for them, performs what `Supervision` decides."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from shared.cli.processes import last_line, log_size, spawn, summed_pss_bytes
from shared.cli.run_folder import Events, Facts, RunFolder
from shared.cli.supervision import (
    Action,
    Child,
    Event,
    Exited,
    Finished,
    Policy,
    RestartPlanned,
    Signal,
    Start,
    StopAsked,
    Supervision,
    Tick,
    describe_exit,
)
from shared.runtime.errors import RuntimeFault

_SIGNALS = {"term": signal.SIGTERM, "kill": signal.SIGKILL}
_MEMORY_PERIOD_S = 2.0


@dataclass(frozen=True)
class Command:
    """How to start one child."""

    child: Child
    argv: tuple[str, ...]
    environ: Mapping[str, str] = field(default_factory=dict[str, str])
    """The whole environment of the process."""
    wait_ready: Callable[[], Awaitable[None]] | None = None
    """Awaited after the first start, before the next child starts; raises `RuntimeFault`."""


Companion = Callable[[], Coroutine[None, None, None]]
"""Runs beside the children until they have finished: the live view, the demo's kill."""


class Supervisor:
    """One run's processes. `run` returns when all of them are gone."""

    def __init__(
        self,
        commands: Sequence[Command],
        folder: RunFolder,
        events: Events,
        facts: Facts,
        policy: Policy | None = None,
        *,
        learner_done: Callable[[], Awaitable[bool]] | None = None,
    ) -> None:
        """Prepare; nothing is started yet.

        Args:
            commands: the children, in the order to start them.
            folder: owned run folder, for logs.
            events: where every event goes.
            facts: `run.json`, kept up to date.
            policy: numbers of restarting and stopping.
            learner_done: asked when the learner exits 0: is the run finished? None: yes.
        """
        self._learner_done = learner_done
        self._commands = {command.child.pod: command for command in commands}
        self._folder = folder
        self._events = events
        self._facts = facts
        self._supervision = Supervision([command.child for command in commands], policy)
        self._incoming: asyncio.Queue[Event] = asyncio.Queue()
        self._live: dict[str, asyncio.subprocess.Process] = {}
        self._finished: Finished | None = None

    @property
    def restarts(self) -> dict[str, int]:
        return self._supervision.restarts

    @property
    def stopping(self) -> bool:
        return self._supervision.stopping

    def pods(self, role: str) -> list[str]:
        """Return the live pods of a role."""
        return [pod for pod in self._live if self._commands[pod].child.role == role]

    def ask_stop(self, reason: str) -> None:
        """Drain; a second time, kill."""
        self._incoming.put_nowait(StopAsked(time.monotonic(), reason))

    def kill(self, pod: str, **fields: object) -> None:
        """Kill a child with -9, on the record."""
        process = self._live[pod]
        self._events.write("kill", pod, pid=process.pid, **fields)
        self._facts.values["kills"].append({"pod": pod, "at": time.time()})
        process.kill()

    def kill_hung(self, pod: str, cause: str) -> None:
        """Kill a child that is alive and does nothing; it is restarted like any that dies."""
        process = self._live.get(pod)
        if process is not None and not self.stopping:
            self._events.write("hung", pod, pid=process.pid, cause=cause)
            process.kill()

    async def run(self, companions: Sequence[Companion] = ()) -> Finished:
        """Start everything, keep it running, stop it in order."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self.ask_stop, "interrupted")
        try:
            async with asyncio.TaskGroup() as group:
                beside = [group.create_task(self._accompany(c)) for c in companions]
                beside.append(group.create_task(self._sample_memory()))
                finished = await self._supervise(group)
                for task in beside:
                    task.cancel()
        finally:
            for process in self._live.values():
                with suppress(ProcessLookupError):
                    process.kill()
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                loop.remove_signal_handler(number)
            self._note()
        return finished

    async def _supervise(self, group: asyncio.TaskGroup) -> Finished:
        await self._perform(self._supervision.begin(), group)
        while self._finished is None:
            await self._perform(self._supervision.handle(await self._next_event()), group)
        self._events.write("finished", reason=self._finished.reason, code=self._finished.code)
        self._facts.values["exit"] = self._finished.reason
        self._facts.values["finished_at"] = time.time()
        return self._finished

    async def _next_event(self) -> Event:
        wake_at = self._supervision.wake_at()
        bound_s = None if wake_at is None else max(0.0, wake_at - time.monotonic())
        try:
            return await asyncio.wait_for(self._incoming.get(), bound_s)
        except TimeoutError:
            return Tick(time.monotonic())

    async def _perform(self, actions: Sequence[Action], group: asyncio.TaskGroup) -> None:
        for action in actions:
            match action:
                case Start(pod, restart):
                    await self._start(pod, restart, group)
                case Signal(pod, kind):
                    self._events.write("stopping", pod, signal=kind)
                    with suppress(KeyError, ProcessLookupError):
                        self._live[pod].send_signal(_SIGNALS[kind])
                case RestartPlanned(pod, cause, delay_s):
                    self._events.write("restart", pod, cause=cause, delay_s=delay_s)
                case Finished():
                    self._finished = action
        self._facts.set_restarts(self._supervision.restarts)

    async def _start(self, pod: str, restart: int, group: asyncio.TaskGroup) -> None:
        command = self._commands[pod]
        log_path = self._folder.log_path(pod)
        started, log_start = time.monotonic(), log_size(log_path)
        try:
            process = await spawn(command.argv, log_path, command.environ)
        except OSError as error:
            why = f"cannot start: {error.strerror or error}"
            self._incoming.put_nowait(Exited(pod, 127, time.monotonic(), 0.0, why))
            return
        self._live[pod] = process
        self._events.write(
            "started", pod, role=command.child.role, pid=process.pid, restart=restart
        )
        group.create_task(self._watch(pod, process, started, log_start))
        if command.wait_ready is not None and restart == 0:
            try:
                await command.wait_ready()
            except RuntimeFault as error:
                self._incoming.put_nowait(StopAsked(time.monotonic(), f"{pod}: {error}", code=2))

    async def _watch(
        self, pod: str, process: asyncio.subprocess.Process, started: float, log_start: int
    ) -> None:
        code = await process.wait()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what the child itself had started
        del self._live[pod]
        detail = last_line(self._folder.log_path(pod), log_start) if code > 0 else ""
        now = time.monotonic()
        self._events.write(
            "exited", pod, code=code, lived_s=now - started, cause=describe_exit(code, detail)
        )
        done = True
        if self._commands[pod].child.role == "learner" and code == 0 and not self.stopping:
            done = self._learner_done is None or await self._learner_done()
        self._incoming.put_nowait(Exited(pod, code, now, now - started, detail, done))

    async def _accompany(self, companion: Companion) -> None:
        try:
            await companion()
        except* RuntimeFault as group:
            # what merely watches must not end the run
            causes = "; ".join(str(error) for error in group.exceptions)
            self._events.write("companion_failed", cause=causes)

    async def _sample_memory(self) -> None:
        while True:
            await asyncio.sleep(_MEMORY_PERIOD_S)
            total = await asyncio.to_thread(summed_pss_bytes, os.getpid())
            values = self._facts.values
            values["peak_pss_bytes"] = max(values["peak_pss_bytes"], total)
            self._note()

    def _note(self) -> None:
        self._facts.set_restarts(self._supervision.restarts)
        self._facts.write()
