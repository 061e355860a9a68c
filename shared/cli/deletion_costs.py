"""`python -m shared.cli.deletion_costs`: rollout pods carry their work in flight as deletion cost.

Scale-in then takes the pods with the least to hand back. Everything works without it: a rollout
that is told to stop sends what it sampled as partial turns, and env agents resume them elsewhere.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from shared.cli.config_cmd import read
from shared.runtime import logs
from shared.runtime.bus import Bus
from shared.runtime.errors import BusUnavailable, ConfigError
from shared.runtime.kube import Kube, PodView
from shared.runtime.leases import LeaseBoard
from shared.runtime.logs import Log
from shared.runtime.nats_bus import connect
from shared.runtime.sections import CommonConfig
from shared.runtime.signals import leave_at_sigterm, stop_on_signals, unless_stopped
from shared.wire.subjects import Subjects
from shared.wire.telemetry import Lease

STEP = 0.25
"""A cost that changed by less than this share is not worth a request to the API server."""


def costs(leases: Iterable[Lease]) -> dict[str, int]:
    """Return requests in flight by pod; a pod that drains or is not ready costs nothing."""
    return {
        lease.pod: int(lease.gauges.get("open_requests", 0.0)) if lease.ready else 0
        for lease in leases
    }


def changes(wanted: Mapping[str, int], pods: Iterable[PodView]) -> dict[str, int]:
    """Return the costs worth writing: of pods that are there, and clearly different."""
    due: dict[str, int] = {}
    for pod in pods:
        cost = wanted.get(pod.name)
        if cost is None or pod.phase == "Terminating":
            continue
        present = int(pod.cost) if pod.cost.lstrip("-").isdigit() else None
        if present is None or (cost != present and abs(cost - present) >= STEP * max(1, present)):
            due[pod.name] = cost
    return due


async def annotate(bus: Bus, kube: Kube, selector: str, *, interval_s: float, expiry_s: float,
                   stop: asyncio.Event, log: Log) -> None:  # fmt: skip
    """Write costs until told to stop; what Kubernetes refuses is logged and tried again."""
    board = LeaseBoard(bus, expiry_s)
    await board.start()
    try:
        while not stop.is_set():
            try:
                async with asyncio.timeout(interval_s):
                    await stop.wait()
            except TimeoutError:
                wanted = costs(board.live("rollout"))
                try:
                    due = changes(wanted, await asyncio.to_thread(kube.pods, selector))
                    for pod, cost in due.items():
                        await asyncio.to_thread(kube.set_cost, pod, cost)
                except ConfigError as error:
                    log.warning("costs_unwritten", reason=str(error))
    finally:
        await board.close()


async def _run(common: CommonConfig, kube: Kube, selector: str, interval_s: float) -> None:
    log = Log("operator", "deletion-costs")
    stop = asyncio.Event()
    stop_on_signals(stop, lambda name: log.info("stopping", signal=name))
    bus = await unless_stopped(stop, connect(common.bus, Subjects(common.run.name), "costs", log))
    if bus is None:
        return
    try:
        await annotate(
            bus, kube, selector, interval_s=interval_s,
            expiry_s=common.telemetry.lease_expiry_s, stop=stop, log=log,
        )  # fmt: skip
    finally:
        await bus.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Annotate until SIGTERM; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m shared.cli.deletion_costs")
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--selector", required=True, help="labels of the rollout pods")
    parser.add_argument("--interval", type=float, default=5.0, metavar="S")
    arguments = parser.parse_args(argv)
    leave_at_sigterm()  # until the loop runs
    logs.configure("INFO")
    try:
        common = read(arguments.config).common()
        namespace = os.environ.get("POD_NAMESPACE", "default")
        asyncio.run(_run(common, Kube(namespace), arguments.selector, arguments.interval))
    except (ConfigError, BusUnavailable) as error:
        sys.stderr.write(f"deletion_costs: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
