"""One supervised run from a values file: bus, recorder, services, live view."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import socket
import sys
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TextIO, cast

from shared.cli import torchrun
from shared.cli.config_cmd import Values, check_model_directory, validate
from shared.cli.display import Display
from shared.cli.processes import child_environment
from shared.cli.progress import Progress
from shared.cli.run_folder import Events, Facts, RunFolder, set_aside
from shared.cli.supervision import Child, ChildRole, Finished
from shared.cli.supervisor import Command, Companion, Supervisor
from shared.runtime import nats_server
from shared.runtime.bus import Bus
from shared.runtime.errors import BusUnavailable, ConfigError
from shared.runtime.logs import JsonFormatter, Log
from shared.runtime.nats_bus import connect
from shared.runtime.sections import CommonConfig
from shared.wire.codec import decode
from shared.wire.subjects import Subjects
from shared.wire.weights import Control

START_ORDER: tuple[ChildRole, ...] = ("learner", "logit_oracle", "rollout", "env_agents")
"""The slowest to import first; all of them import in parallel."""

_NATS_BOUND_S = 20.0

_DRAIN_MARGIN_S = 3
"""Between the end of rank 0's drain and the kill of ranks that are left."""

_SILENT_S = 30.0
"""A service without a lease for so long, while others are heard, is hung."""


@dataclass(frozen=True)
class Request:
    """What to run and where."""

    values: Values
    run_dir: Path
    title: str
    command: list[str]
    fresh: bool
    """Keep an earlier run of this folder under a suffix; otherwise go on with it."""
    nats_url: str | None = None
    """An existing NATS; None: start one in the run folder."""
    nats_port: int | None = None
    """Of the one we start; None: any free one."""


@dataclass
class Running:
    """A run under way, for those who accompany it."""

    supervisor: Supervisor
    progress: Progress
    facts: Facts
    versions: int


Beside = Callable[[Running], Coroutine[None, None, None]]


def ranks_of(models: Mapping[str, CommonConfig]) -> dict[str, int]:
    """Return how many processes a service of each role is, where it is said."""
    found: dict[str, int] = {}
    for role, model in models.items():
        section = getattr(model, role, None)
        found[role] = int(getattr(section, "ranks", 1))
    return found


async def run_session(
    request: Request, out: TextIO, beside: Sequence[Beside] = ()
) -> tuple[Finished, Facts]:
    """Run to the end.

    Raises:
        ConfigError: bad input; nothing was started.
        BusUnavailable: the NATS asked for does not answer.
    """
    models = validate(request.values)
    check_model_directory(request.values)
    learner = models["learner"].model_dump()["learner"]
    # whatever can be refused is refused before anything is written
    endpoint = await _Endpoint.prepare(request)
    try:
        if request.fresh:
            kept = set_aside(request.run_dir)
            if kept is not None:
                out.write(f"the earlier run is kept in {kept}\n")
        resumed = (request.run_dir / "run.json").exists()
        with RunFolder(request.run_dir) as folder:
            _log_to(folder.log_path("supervisor"))
            facts = Facts(folder.path, request.command, resumed=resumed)
            run = _Run(request, endpoint, folder, facts, ranks_of(models))
            return await run.supervise(cast(int, learner["versions"]), out, beside), facts
    finally:
        if endpoint.bus is not None:
            await endpoint.bus.close()


@dataclass
class _Endpoint:
    """The run's NATS: an address, and our connection once there is one."""

    common: CommonConfig
    """With the address in it."""
    own_port: int | None
    """Of the server we start; None: somebody else's server."""
    fresh: bool
    bus: Bus | None = None

    @classmethod
    async def prepare(cls, request: Request) -> _Endpoint:
        """Choose a port of our own, or connect to the server asked for.

        Raises:
            ConfigError: no nats-server to start, the port is in use, or the run exists there.
            BusUnavailable: the server asked for does not answer.
        """
        own_port = None
        if request.nats_url is None:
            nats_server.find_binary()
            own_port = _port(request.nats_port)
        url = request.nats_url or f"nats://127.0.0.1:{own_port}"
        endpoint = cls(request.values.with_config("bus", url=url).common(), own_port, request.fresh)
        if own_port is None:
            await endpoint.open()
        return endpoint

    async def open(self) -> None:
        """Connect and create what is missing."""
        run, name = self.common.bus, self.common.run.name
        bus = await connect(run, Subjects(name), "supervisor", Log("supervisor"))
        self.bus = bus
        await bus.create_streams()
        if self.fresh and (await bus.stream_state("journal")).last_seq:
            await bus.close()
            raise ConfigError(
                f"run {name!r} already exists on {run.url}: "
                "resume it with --resume, or choose another name with --set run.name=..."
            )

    async def start(self) -> None:
        """Wait until the server we started is healthy, then connect."""
        await asyncio.to_thread(nats_server.wait_healthy, self.common.bus.url, _NATS_BOUND_S)
        await self.open()

    async def is_done(self) -> bool:
        """Return whether the learner has declared the run finished."""
        if self.bus is None:
            return False
        try:
            payload = await self.bus.get_control("control")
        except BusUnavailable:
            return False
        return payload is not None and decode(payload, Control).phase == "done"


class _Run:
    def __init__(
        self,
        request: Request,
        endpoint: _Endpoint,
        folder: RunFolder,
        facts: Facts,
        ranks: Mapping[str, int],
    ) -> None:
        self._request = request
        self._ranks = ranks
        self._endpoint = endpoint
        self._folder = folder
        self._facts = facts
        values = request.values.with_config("bus", url=endpoint.common.bus.url)
        self._values = values.with_config("run", dir=str(folder.path))
        self._common = self._values.common()
        facts.values |= {"nats_url": self._common.bus.url, "run": self._common.run.name}
        self._bus_open = asyncio.Event()

    async def supervise(self, versions: int, out: TextIO, beside: Sequence[Beside]) -> Finished:
        self._folder.write_resolved(self._values.tree)
        events = Events(self._folder.path)
        progress = Progress(
            started_at=time.time(),
            versions=versions,
            staleness_bound=self._common.admission.max_staleness,
            lease_expiry_s=self._common.telemetry.lease_expiry_s,
        )
        display = Display(progress, self._request.title, out)
        events.observers.append(display.on_event)
        supervisor = Supervisor(
            self._commands(),
            self._folder,
            events,
            self._facts,
            learner_done=self._endpoint.is_done,
        )
        running = Running(supervisor, progress, self._facts, versions)
        companions: list[Companion] = [
            display.draw,
            lambda: self._follow(display),
            lambda: self._restart_silent(supervisor, progress),
        ]
        companions += [partial(companion, running) for companion in beside]
        if self._endpoint.bus is not None:
            self._bus_open.set()
        finished = await supervisor.run(companions)
        self._facts.values["training_started_at"] = progress.training_started_at
        self._facts.write()
        return finished

    async def _wait_for_nats(self) -> None:
        await self._endpoint.start()
        self._bus_open.set()

    async def _follow(self, display: Display) -> None:
        await self._bus_open.wait()
        assert self._endpoint.bus is not None
        await display.follow(self._endpoint.bus)

    async def _restart_silent(self, supervisor: Supervisor, progress: Progress) -> None:
        """Do what a liveness probe does on a cluster."""
        bound_s = max(_SILENT_S, 5 * self._common.telemetry.lease_expiry_s)
        while not supervisor.stopping:
            await asyncio.sleep(1.0)
            for pod in progress.silent(time.time(), bound_s):
                supervisor.kill_hung(pod, f"no lease for {bound_s:g} s")
                progress.forget(pod)

    # --- processes
    def _commands(self) -> list[Command]:
        commands: list[Command] = []
        if self._endpoint.own_port is not None:
            commands.append(self._nats(self._endpoint.own_port))
        number = 0
        for role in START_ORDER:
            for index in range(self._values.replicas[role]):
                pod = f"{role.replace('_', '-')}-{index}"
                argv = self._service(role, pod)
                extra: dict[str, str] = {}
                if self._common.telemetry.port:
                    # one address, one port: each process gets the next one
                    extra["LAGWISE_TELEMETRY__PORT"] = str(self._common.telemetry.port + number)
                commands.append(self._command(pod, role, argv, extra))
                number += 1
        commands.append(
            self._command("recorder", "recorder", self._python("shared.cli.recorder"), {})
        )
        return commands

    def _service(self, role: ChildRole, pod: str) -> tuple[str, ...]:
        """Return the command of a service; one of several ranks is started by torchrun."""
        python, *rest = self._python(f"services.{role}", "--pod", pod, role=role)
        ranks = self._ranks.get(role, 1)
        if ranks == 1:
            return (python, *rest)
        drain_s = math.ceil(self._common.telemetry.drain_s) + _DRAIN_MARGIN_S
        return torchrun.command(python, ranks, rest, shutdown_s=drain_s)

    def _python(self, module: str, *arguments: str, role: str = "") -> tuple[str, ...]:
        """Return the command of a module; a role may have an environment of its own (vLLM)."""
        config = str(self._folder.resolved_path)
        python = os.environ.get(f"LAGWISE_{role.upper()}_PYTHON") or sys.executable
        return (python, "-m", module, "--config", config, *arguments)

    def _command(
        self, pod: str, role: ChildRole, argv: tuple[str, ...], extra: dict[str, str]
    ) -> Command:
        return Command(Child(pod, role), argv, child_environment(os.environ, extra))

    def _nats(self, port: int) -> Command:
        store = self._folder.path.resolve() / "nats"
        store.mkdir(exist_ok=True)
        config_path = store / "nats.conf"
        nats_server.write_config(config_path, port=port, store_dir=store)
        return Command(
            Child("nats", "nats"),
            (str(nats_server.find_binary()), "-c", str(config_path)),
            child_environment(os.environ),
            wait_ready=self._wait_for_nats,
        )


def _port(asked: int | None) -> int:
    """Return a usable port.

    Raises:
        ConfigError: the port asked for is in use.
    """
    if asked is None:
        return nats_server.free_port()
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", asked))
        except OSError as error:
            raise ConfigError(
                f"port {asked} of 127.0.0.1: {error.strerror}; choose another --nats-port, "
                f"or use the NATS that runs there with --nats nats://127.0.0.1:{asked}"
            ) from error
    return asked


def _log_to(path: Path) -> None:
    """Send this process's own log to a file: the terminal belongs to the live view."""
    handler = logging.FileHandler(path)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    for old in root.handlers:
        old.close()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
