"""The rendered release as local processes: trains, scales under load, loses nothing."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shared.cli import audit, status
from shared.runtime.sections import BusSection

from tests.charts.local_pods import LocalPods
from tests.charts.rendering import ROOT, of_kind, render

pytestmark = [pytest.mark.chart_run, pytest.mark.timeout(420)]

VERSIONS = 24
VALUES = {
    "autoscaling": {"mode": "external"},
    "rollout": {"replicas": None},
    "env_agents": {"replicas": None},
    "logit_oracle": {"replicas": None},
    "config": {
        "run": {"name": "chart-run"},
        "telemetry": {"drain_s": 8},
        "task": {"options": {"size": 3, "p": 0.9}},
        "learner": {"versions": VERSIONS, "eval": {"episodes": 0}},
    },
}


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[LocalPods]:
    objects = render(VALUES, ROOT / "examples/frozen_lake/values.yaml", release="run")
    for role in ("rollout", "env-agents", "logit-oracle"):
        assert "replicas" not in of_kind(objects, "Deployment", role)[0]["spec"]
    pods = LocalPods(objects, tmp_path, replicas={"rollout": 2, "env-agents": 2})
    yield pods
    pods.close()


def look(cluster: LocalPods) -> status.Status:
    secret = of_kind(cluster.objects, "Secret")[0]["data"]["operator"]
    password = cluster.folder / "operator-password"
    password.write_bytes(base64.b64decode(secret))
    section = BusSection(
        url=f"nats://127.0.0.1:{cluster.nats_ports[4222]}",
        user="operator",
        password_file=str(password),
    )
    return asyncio.run(status.ask(section, "chart-run", listen_s=2.2, timeout_s=10))


def until(condition: Callable[[], bool], bound_s: float, what: str) -> None:
    deadline = time.monotonic() + bound_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {bound_s} s: {what}"
        time.sleep(0.2)


def reach(cluster: LocalPods, version: int, bound_s: float = 120) -> None:
    def reached() -> bool:
        try:
            return look(cluster).head_version >= version
        except status.ConfigError:
            return False  # the learner has not created the streams yet

    until(reached, bound_s, f"version {version}:\n{logs(cluster)}")


def logs(cluster: LocalPods) -> str:
    tails = []
    for path in sorted(cluster.folder.glob("*/*.log")):
        lines = path.read_text().splitlines()
        tails.append(f"--- {path.parent.name}/{path.name}\n" + "\n".join(lines[-4:]))
    return "\n".join(tails)


def test_a_rendered_release_trains_while_rollouts_go_from_two_to_four_to_one(cluster: LocalPods):
    reach(cluster, 3)
    cluster.scale("rollout", 4)
    until(lambda: cluster.ready("rollout") == 4, 60, "four ready rollouts")
    before = look(cluster).head_version
    reach(cluster, before + 2)
    cluster.scale("rollout", 1)
    after = look(cluster)
    assert {s["pod"] for s in after.services if s["role"] == "rollout" and s["ready"]} == {
        cluster.pods["rollout"][0].name
    }
    reach(cluster, VERSIONS)
    until(lambda: look(cluster).phase == "done", 60, "the end of the run")

    final = look(cluster)
    assert final.ledger["trained"] > 0
    assert final.ledger["failed"] == final.ledger["dropped"] == 0, final.ledger
    assert final.streams["dead"]["messages"] == 0
    # alive and ready to the last: at_end wait, or a cluster would start the learner again for ever
    for pods in cluster.pods.values():
        for pod in pods:
            for container in pod.containers:
                assert container.exits == [], (pod.name, container.name, logs(cluster))
                assert container.probes.verdicts == []
            if "startupProbe" in pod.main.spec:
                assert pod.main.probes.started_after_s is not None, pod.name
                assert pod.main.probes.ready_polls > 2
                assert pod.main.probes.ready, pod.name
    cluster.close()
    for pod, containers in cluster.ends.items():
        for name, (code, killed) in containers.items():
            assert (code, killed) == (0, False), (pod, name, code, logs(cluster))
    run_dir = next((cluster.folder / "claims").glob("run-data-*"))
    found = audit.run(run_dir, tokens=200, seed=0)
    assert found.ledger.lost == found.ledger.duplicated == 0, audit.table(found)
    denied = [p for p in cluster.folder.glob("*/*.log") if "bus_denied" in p.read_text()]
    assert denied == []
