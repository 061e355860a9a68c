"""Scale-in takes the idlest rollout: costs from leases, written where they changed."""

from __future__ import annotations

import asyncio
import threading
import time

from shared.cli.deletion_costs import annotate, changes, costs
from shared.runtime.errors import ConfigError
from shared.runtime.kube import PodView
from shared.runtime.logs import Log
from shared.runtime.memory_bus import MemoryBus
from shared.wire.codec import encode
from shared.wire.telemetry import Lease


def lease(pod: str, open_requests: float, *, ready: bool = True) -> Lease:
    return Lease(
        role="rollout", pod=pod, incarnation="i", pid=1, sent_at=time.time(), ready=ready,
        gauges={"open_requests": open_requests},
    )  # fmt: skip


def view(name: str, cost: str = "", phase: str = "Running") -> PodView:
    return PodView(
        name=name, role="rollout", phase=phase, ready=True, reason="", node="n", image="i", gpus=1,
        restarts=0, cost=cost,
    )  # fmt: skip


def test_the_cost_is_the_work_in_flight_and_a_pod_that_is_not_ready_costs_nothing():
    leases = [lease("a", 12), lease("b", 0), lease("c", 5, ready=False)]
    assert costs(leases) == {"a": 12, "b": 0, "c": 0}


def test_only_clear_changes_of_pods_that_stay_are_written():
    wanted = {"new": 0, "same": 8, "near": 9, "far": 16, "gone": 3, "leaving": 4, "idle": 0}
    pods = [
        view("new"), view("same", "8"), view("near", "8"), view("far", "8"),
        view("leaving", "", "Terminating"), view("idle", "1"), view("unknown", "3"),
        view("odd", "many"),
    ]  # fmt: skip
    assert changes({**wanted, "odd": 2}, pods) == {"new": 0, "far": 16, "idle": 0, "odd": 2}


class Cluster:
    """Stands where Kubernetes would be; refuses the first time."""

    def __init__(self) -> None:
        self.written: dict[str, int] = {}
        self.refusals = 1
        self.complete = threading.Event()

    def pods(self, selector: str) -> list[PodView]:
        assert selector == "a=b"
        if self.refusals:
            self.refusals -= 1
            raise ConfigError("Kubernetes refuses (403)")
        return [view(name, str(self.written.get(name, ""))) for name in ("busy", "idle")]

    def set_cost(self, pod: str, cost: int) -> None:
        self.written[pod] = cost
        if self.written == {"busy": 9, "idle": 0}:
            self.complete.set()


async def test_it_listens_writes_and_survives_a_refusal(memory_bus: MemoryBus):
    stop, cluster = asyncio.Event(), Cluster()
    other = MemoryBus(memory_bus.subjects, memory_bus.server)
    running = asyncio.create_task(
        annotate(memory_bus, cluster, "a=b", interval_s=0.02, expiry_s=60, stop=stop, log=Log("t"))  # type: ignore[arg-type]
    )
    await asyncio.sleep(0.05)
    for pod, requests in (("busy", 9.0), ("idle", 0.0)):
        await other.publish(other.subjects.lease("rollout", pod), encode(lease(pod, requests)))
    assert await asyncio.to_thread(cluster.complete.wait, 10), cluster.written
    stop.set()
    await running
