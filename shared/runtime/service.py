"""The life of a service process, the same for all four: parse, connect, serve, drain, exit.

Exit codes: 0 clean; 2 configuration or no bus at start; 3 fenced by another process; 1 the rest.
Every exit but a clean one leaves one plain line on stderr beside the JSON event.
"""

from __future__ import annotations

import asyncio
import errno
import os
import re
import signal
import sys
import threading
import traceback
import uuid
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NoReturn, TypeVar

import uvloop
from prometheus_client import CollectorRegistry

from shared.runtime import metrics
from shared.runtime.context import Context, Health
from shared.runtime.errors import BusUnavailable, ConfigError, Fatal, Fenced, RuntimeFault
from shared.runtime.http import HttpServer, Pulse
from shared.runtime.leases import STOPPED
from shared.runtime.logs import Log, configure
from shared.runtime.nats_bus import connect
from shared.runtime.options import Options, parse_options, read_config
from shared.runtime.rank_life import die_with_launcher, is_follower, is_rank, leave_now
from shared.runtime.sections import CommonConfig
from shared.runtime.signals import end_at_signals, leave_at_sigterm, stop_on_signals, unless_stopped
from shared.wire.codec import encode
from shared.wire.subjects import Subjects
from shared.wire.telemetry import Role

C = TypeVar("C", bound=CommonConfig)
Serve = Callable[[Context, C], Awaitable[None]]
Follow = Callable[[C], None]
"""What a rank above 0 does instead of serving; raises ConfigError."""

EXIT_CLEAN = 0
EXIT_FAILED = 1
EXIT_CONFIG = 2
EXIT_FENCED = 3

LEAVE_S = 5.0
"""What is left of a process this long after its loop ended (a hung thread) is cut off."""
LEASE_GAP_S = 0.05
"""Least time between two leases, however often versions change."""
BEAT_S = 0.5
_POD = re.compile(r"[A-Za-z0-9_-]{1,100}")


class DrainTimedOut(Fatal):
    """The service did not return within its bound after the stop signal."""


def launch(
    role: Role,
    config_model: type[C],
    serve: Serve[C],
    argv: Sequence[str] | None = None,
    *,
    follow: Follow[C] | None = None,
) -> NoReturn:
    """Run a service as this process and exit with its code.

    Started by torchrun as one of several ranks, only rank 0 serves; the others `follow`.
    """
    leave_at_sigterm()  # until the loop runs
    configure("INFO")
    ranked = follow is not None and is_rank()
    if ranked:
        die_with_launcher()
    options = parse_options(role, sys.argv[1:] if argv is None else argv)
    pod = options.pod or f"{role}-{uuid.uuid4().hex[:6]}"
    log = Log(role, pod)
    try:
        if follow is not None and is_follower():
            code = _follow(role, read_config(options, config_model), follow, log)
        else:
            config = _load(options, config_model, pod, log)
            code = uvloop.run(_guarded(role, pod, config, serve, log))
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except ConfigError as error:
        code = _report(role, error, log)
    if ranked:
        leave_now(code)
    sys.exit(code)


def exit_code(error: BaseException) -> int:
    """Return the code of the process that ends with `error`."""
    match error:
        case ConfigError():
            return EXIT_CONFIG
        case Fenced():
            return EXIT_FENCED
        case _:
            return EXIT_FAILED


def cause_of(error: BaseException) -> BaseException:
    """Return the one error of a group that decides: what we raised on purpose comes first."""
    if not isinstance(error, BaseExceptionGroup):
        return error
    leaves = [cause_of(inner) for inner in error.exceptions]
    ranks: tuple[type[BaseException], ...] = (Fenced, Fatal, ConfigError, OSError, RuntimeFault)
    for rank in ranks:
        for leaf in leaves:
            if isinstance(leaf, rank):
                return leaf
    return leaves[0]


def line_of(error: BaseException) -> str:
    """Return one line saying what happened and, where we know, what to do."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full: {error.filename or 'no file named'}; free space and start again"
    if isinstance(error, RuntimeFault):
        return " ".join(str(error).split())
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:500]


async def _guarded(role: Role, pod: str, config: C, serve: Serve[C], log: Log) -> int:
    """Serve; return the exit code, with the process's end already certain."""
    try:
        await _run(role, pod, config, serve, log)
    except asyncio.CancelledError:
        raise  # Ctrl-C before the service took over the signals
    except BaseException as error:  # noqa: BLE001 - the shell: every end gets its line and code
        code = _report(role, error, log)
        end_at_signals(code)
    else:
        code = EXIT_CLEAN
    _leave_for_certain(code)
    return code


async def _run(role: Role, pod: str, config: C, serve: Serve[C], log: Log) -> None:
    """Serve inside everything a process needs around it."""
    telemetry = config.telemetry
    health, registry, pulse = Health(), CollectorRegistry(), Pulse(telemetry.stall_s)
    health.set_unready("connecting to the bus")
    holder: list[Context] = []

    def ready_problem() -> str:
        if health.reason or not holder:
            return health.reason or "starting"
        return "" if holder[0].bus.connected else "no connection to the bus"

    stop = asyncio.Event()
    stop_on_signals(stop, lambda name: log.info("stopping", signal=name))
    http = HttpServer(telemetry.host, telemetry.port, registry, pulse, ready_problem)
    try:
        log.info("http", host=telemetry.host, port=http.port)
        try:
            bus = await unless_stopped(stop, connect(config.bus, _subjects(config), role, log))
        except BusUnavailable as error:
            raise ConfigError(str(error)) from error
        if bus is None:
            return
        try:
            context = Context(role, pod, uuid.uuid4().hex, bus, log, registry, health, stop)
            context.gauges["http_port"] = float(http.port)
            # An alert on its increase must have seen it at 0.
            context.count("dead_letters", 0.0)
            context.health.set_unready("starting")
            holder.append(context)
            metrics.register(context, registry)
            await run_service(context, config, serve, pulse)
        finally:
            await bus.close()
    finally:
        http.close()


async def run_service(context: Context, config: C, serve: Serve[C], pulse: Pulse) -> None:
    """Serve with leases and pulse until `serve` returns.

    Raises:
        DrainTimedOut: it did not return within `drain_s` of the stop signal.
        Exception: what `serve` raised, possibly in a group.
    """
    telemetry = config.telemetry
    try:
        async with asyncio.TaskGroup() as group:
            around = [
                group.create_task(_beat(pulse)),
                group.create_task(_renew_lease(context, telemetry.lease_interval_s)),
            ]
            serving = group.create_task(_serve(context, config, serve))
            around.append(group.create_task(_bound_drain(context, serving, telemetry.drain_s)))
            serving.add_done_callback(lambda _: [task.cancel() for task in around])
    finally:
        context.health.set_unready(STOPPED)
        await _send_lease(context)


async def _serve(context: Context, config: C, serve: Serve[C]) -> None:
    await serve(context, config)
    context.log.info("served", **context.counters)


async def _bound_drain(context: Context, serving: asyncio.Task[None], drain_s: float) -> None:
    await context.stop.wait()
    done, _ = await asyncio.wait([serving], timeout=drain_s)
    if not done:
        raise DrainTimedOut(
            f"did not drain within {drain_s:g} s of the stop signal (telemetry.drain_s)"
        )


async def _beat(pulse: Pulse) -> None:
    while True:
        pulse.beat()
        await asyncio.sleep(BEAT_S)


async def _renew_lease(context: Context, interval_s: float) -> None:
    while True:
        context.lease_due.clear()
        await _send_lease(context)
        await asyncio.sleep(min(LEASE_GAP_S, interval_s))
        try:
            async with asyncio.timeout(interval_s):
                await context.lease_due.wait()
        except TimeoutError:
            continue


async def _send_lease(context: Context) -> None:
    subject = context.bus.subjects.lease(context.role, context.pod)
    await context.bus.publish(subject, encode(context.lease(os.getpid())))


def _load(options: Options, config_model: type[C], pod: str, log: Log) -> C:
    config = read_config(options, config_model)
    if not _POD.fullmatch(pod):
        raise ConfigError(f"--pod {pod}: use letters, digits, _ and -, at most 100")
    _subjects(config)
    configure(config.telemetry.log_level)
    shown: dict[str, Any] = config.model_dump(mode="json")
    log.info("config", config=shown, version=metrics.lagwise_version())
    return config


def _follow(role: Role, config: C, follow: Follow[C], log: Log) -> int:
    configure(config.telemetry.log_level)
    try:
        follow(config)
    except Exception as error:  # noqa: BLE001 - the shell: every end gets its line and code
        return _report(role, error, log)
    return EXIT_CLEAN


def _subjects(config: CommonConfig) -> Subjects:
    try:
        return Subjects(config.run.name)
    except ValueError as error:
        raise ConfigError(f"run.name: {error}") from error


def _report(role: str, error: BaseException, log: Log) -> int:
    """Write the one line, and the event with what a developer needs; return the exit code."""
    cause = cause_of(error)
    line = line_of(cause)
    fields: dict[str, Any] = {"reason": line, "code": exit_code(cause)}
    if not isinstance(cause, RuntimeFault):
        fields["traceback"] = "".join(traceback.format_exception(cause))
    log.error("failed", **fields)
    sys.stderr.write(f"lagwise {role}: {line}\n")
    return exit_code(cause)


def _leave_for_certain(code: int) -> None:
    """Cut the process off should it not end: a hung thread (a user's environment) keeps Python."""
    last_resort = threading.Timer(LEAVE_S, os._exit, args=(code,))
    last_resort.daemon = True
    last_resort.start()
