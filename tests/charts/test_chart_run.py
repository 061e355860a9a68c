"""The rendered release as local processes: trains, scales under load, loses nothing."""

from __future__ import annotations

import asyncio
import base64
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shared.cli import audit, bus_check, ledger, records, status
from shared.runtime.sections import BusSection, CommonConfig, RunSection
from tests.charts.local_pods import LocalPods
from tests.charts.prometheus import DASHBOARDS, Prometheus, expressions, filled_in, rules
from tests.charts.rendering import NAMESPACE, ROOT, of_kind, render, tool

pytestmark = [pytest.mark.chart_run, pytest.mark.timeout(420)]

VERSIONS = 60
"""Enough that a fast machine still trains when the rollouts have been scaled."""
RECORDED = Path(__file__).with_name("recorded")
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


def access(cluster: LocalPods) -> BusSection:
    secret = of_kind(cluster.objects, "Secret")[0]["data"]["operator"]
    password = cluster.folder / "operator-password"
    password.write_bytes(base64.b64decode(secret))
    return BusSection(
        url=f"nats://127.0.0.1:{cluster.nats_ports[4222]}",
        user="operator",
        password_file=str(password),
    )


def look(cluster: LocalPods) -> status.Status:
    return asyncio.run(status.ask(access(cluster), "chart-run", listen_s=2.2, timeout_s=10))


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


@pytest.fixture
def prometheus(cluster: LocalPods) -> Iterator[Prometheus]:
    """Scrapes the pods that are there at the start, labelled as the PodMonitor would."""
    targets = [
        (pod.address_of(9090), {"release": "run", "namespace": NAMESPACE, "pod": pod.name,
                                "component": component})
        for component, pods in cluster.pods.items() if component != "nats"
        for pod in pods
    ]  # fmt: skip
    server = Prometheus(cluster.folder / "prometheus", targets, rules("run"))
    yield server
    server.close()


def record(cluster: LocalPods, number: int) -> None:
    """Keep a scrape of one pod of each role for `test_dashboards.py`."""
    RECORDED.mkdir(exist_ok=True)
    for component in ("learner", "rollout", "env-agents", "logit-oracle"):
        address = cluster.pods[component][0].address_of(9090)
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as answer:
            (RECORDED / f"{component}-{number}.txt").write_bytes(answer.read())


def ask_prometheus(prometheus: Prometheus) -> None:
    """Every expression of every dashboard and rule has an answer in a run under way."""
    silent = [
        (board.name, panel, expr)
        for board in DASHBOARDS
        for panel, expr in expressions(board)
        if not prometheus.query(filled_in(expr, "run", NAMESPACE, "1m"))
    ]
    # canary and episode counters are there from the first; retries only once there was one
    assert [s for s in silent if "retries" not in s[2] and "resumed" not in s[2]] == []
    for group in rules("run")["groups"]:
        for rule in group["rules"]:
            if "record" in rule:
                assert prometheus.query(rule["record"]), rule["record"]
            else:
                prometheus.query(rule["expr"])
    firing = prometheus.query('ALERTS{alertstate="firing"}')
    assert firing == []
    for url in {s["metric"]["instance"] for s in prometheus.query("up")}:
        try:
            with urllib.request.urlopen(f"http://{url}/metrics", timeout=5) as answer:
                text = answer.read()
        except OSError:
            continue  # a rollout that was scaled away
        done = subprocess.run(
            [tool("promtool"), "check", "metrics"], input=text, capture_output=True
        )
        assert done.returncode == 0, (url, done.stderr.decode())


def ask_bus(cluster: LocalPods) -> list[bus_check.Answer]:
    """What `helm test` does, with the rendered pod's arguments and account."""
    pod = of_kind(cluster.objects, "Pod")[0]
    assert pod["spec"]["containers"][0]["command"][-1] == "shared.cli.bus_check"
    common = CommonConfig(run=RunSection(name="chart-run"), bus=access(cluster))
    return asyncio.run(bus_check.check(common, 10))


def test_a_rendered_release_trains_while_rollouts_go_from_two_to_four_to_one(
    cluster: LocalPods, prometheus: Prometheus, request: pytest.FixtureRequest
):
    reach(cluster, 3)
    update = request.config.getoption("--update-golden")
    if update:
        record(cluster, 1)
    cluster.scale("rollout", 4)
    until(lambda: cluster.ready("rollout") == 4, 60, "four ready rollouts")
    if update:
        record(cluster, 2)
    before = look(cluster).head_version
    assert before + 2 < VERSIONS, "scaled when all was over"
    reach(cluster, before + 2)
    cluster.scale("rollout", 1)
    after = look(cluster)
    assert {s["pod"] for s in after.services if s["role"] == "rollout" and s["ready"]} == {
        cluster.pods["rollout"][0].name
    }
    reach(cluster, VERSIONS)
    until(lambda: look(cluster).phase == "done", 60, "the end of the run")

    final = look(cluster)
    ask_prometheus(prometheus)
    assert all(answer.ok for answer in ask_bus(cluster))
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
    book = ledger.of_run(records.load(run_dir))
    assert book.lost == book.duplicated == ()
    found = audit.run(run_dir, tokens=200, seed=0)
    assert found.audited_tokens >= 200, audit.table(found)
    assert found.mismatches == 0, audit.table(found)
    assert found.old_logits_exact_ratio == 1.0
    denied = [p for p in cluster.folder.glob("*/*.log") if "bus_denied" in p.read_text()]
    assert denied == []
