"""`python -m shared.cli.recorder --config FILE`: the process that archives and tracks a run."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from shared.cli.archive import archive_dir
from shared.cli.config_cmd import Values, read
from shared.cli.trackers import wanted
from shared.cli.tracking import Tracking, leave
from shared.runtime import logs
from shared.runtime.errors import BusUnavailable, ConfigError, RuntimeFault
from shared.runtime.logs import Log
from shared.runtime.nats_bus import NatsBus, connect
from shared.runtime.sections import CommonConfig
from shared.runtime.signals import leave_at_sigterm, stop_on_signals, unless_stopped
from shared.wire.subjects import Subjects

_STREAMS_BOUND_S = 60.0
_NICENESS = 5
"""It may lag behind the services; it catches up when they have stopped."""


def main(argv: Sequence[str] | None = None) -> int:
    """Record until SIGTERM; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m shared.cli.recorder")
    parser.add_argument("--config", type=Path, required=True)
    arguments = parser.parse_args(argv)
    leave_at_sigterm()  # until the loop runs
    log = Log("recorder", "recorder")
    try:
        values = read(arguments.config)
        logs.configure(values.common().telemetry.log_level)
        os.nice(_NICENESS)
        code, hanging = asyncio.run(_record(values, log))
        return leave(code, hanging)
    except ConfigError as error:
        sys.stderr.write(f"recorder: {error}\n")
        return 2


async def _record(values: Values, log: Log) -> tuple[int, list[str]]:
    """Return the exit code, and the trackers whose threads hang."""
    from shared.cli.recording import Recording  # torch: only to run

    common = values.common()
    trackers = wanted(common, values.config)
    stop = asyncio.Event()
    stop_on_signals(stop, lambda name: log.info("stopping", signal=name))
    try:
        bus = await unless_stopped(stop, _connected(common, log))
    except BusUnavailable as error:
        raise ConfigError(str(error)) from error
    if bus is None:
        return 0, []
    run_dir = Path(common.run.dir)
    evaluation = values.config.get("learner", {}).get("eval", {})
    tracking = Tracking(
        bus,
        trackers,
        run_dir / "trackers",
        log,
        samples=int(evaluation.get("samples", 1)),
        success=float(evaluation.get("success_reward", 1.0)),
        timeout_s=common.trackers.timeout_s,
    )
    failures: list[str] = []
    try:
        async with asyncio.TaskGroup() as group:
            recording = Recording(bus, archive_dir(run_dir), log, common.weights)
            group.create_task(recording.run(stop))
            group.create_task(tracking.run(stop))
    except* (RuntimeFault, OSError) as group:
        failures += [str(error) for error in _leaves(group)]
    finally:
        await bus.close()
    if failures:
        log.error("recorder_failed", reason="; ".join(failures))
    return (1 if failures else 0), tracking.hanging


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    found: list[BaseException] = []
    for error in group.exceptions:
        found += _leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return found


async def _connected(common: CommonConfig, log: Log) -> NatsBus:
    bus = await connect(common.bus, Subjects(common.run.name), "recorder", log)
    await bus.wait_for_streams(_STREAMS_BOUND_S)
    return bus


if __name__ == "__main__":
    sys.exit(main())
