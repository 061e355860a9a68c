"""A release on an API server: what `helm`, `kubectl` and `lagwise` do there."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.charts.rendering import EXAMPLES, REGISTRY, ROOT, Object
from tests.cluster.conftest import FLAGS, Cluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

MODES = ("none", "external", "hpa")
OPERATORS = ("keda.sh", "monitoring.coreos.com", "leaderworkerset.x-k8s.io")
"""API groups of kinds that an operator brings; not on this server."""


def test_install_scale_upgrade_drain_and_uninstall(cluster: Cluster) -> None:
    """The script of `make test-cluster`, which works on any cluster."""
    said = cluster.run(
        "scripts/test_cluster.sh",
        bound_s=280,
        REGISTRY=REGISTRY["image"]["registry"],
        CHART=str(cluster.chart),
        HELM_FLAGS=" ".join(FLAGS),
        HELM_TEST_FLAGS="",  # logs are the kubelet's to serve
    )
    assert "test-cluster: OK" in said


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_the_server_takes_every_object(
    cluster: Cluster, example: Path, mode: str, tmp_path: Path
) -> None:
    """Validated by the API server itself, admission included; nothing is stored."""
    values: Object = {**REGISTRY, "autoscaling": {"mode": mode}}
    values["monitoring"] = {"prometheusRule": {"enabled": mode == "hpa"}}
    if mode != "none":
        values |= {role: {"replicas": None} for role in ("rollout", "env_agents", "logit_oracle")}
    file = tmp_path / "values.yaml"
    file.write_text(yaml.safe_dump(values))
    rendered = cluster.helm(
        "template", "r1", str(cluster.chart), "-f", str(example), "-f", str(file),
        "--no-hooks", check=False,
    )  # fmt: skip
    if rendered.returncode:
        pytest.fail(rendered.stderr)
    objects = [o for o in yaml.safe_load_all(rendered.stdout) if o]
    known = [o for o in objects if o["apiVersion"].partition("/")[0] not in OPERATORS]
    assert len(known) > 15
    written = tmp_path / "objects.json"
    written.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": known}))
    done = cluster.plane.kubectl(
        "apply", "--dry-run=server", "--validate=false", "-f", str(written), "-o", "name"
    )
    assert len(done.stdout.splitlines()) == len(known)


NAMESPACE = "shared"
VALUES = {
    **REGISTRY,
    "rollout": {"replicas": 2},
    "deletionCost": {"enabled": True},
    "config": {"learner": {"eval": {"episodes": 0}}, "telemetry": {"drain_s": 8}},
}


@pytest.fixture(scope="module")
def release(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A running release `lagwise-1` with two rollouts; its values file."""
    file = tmp_path_factory.mktemp("release") / "values.yaml"
    file.write_text(yaml.safe_dump(VALUES))
    cluster.plane.kubectl("create", "namespace", NAMESPACE)
    # --wait would wait for the annotator too, whose token lies where no process can have it
    cluster.helm("install", "lagwise-1", *_chart(cluster, file))
    _wait_for(cluster, "deployment/rollout", "deployment/env-agents", "statefulset/learner")
    yield file
    cluster.helm("uninstall", "lagwise-1", "--namespace", NAMESPACE)
    _kubectl(cluster, "wait", "--for=delete", "pods", "--all", "--timeout", "90s")


def test_a_node_is_drained_past_the_budgets(cluster: Cluster, release: Path) -> None:
    """Every pod of the node is evicted, one rollout at a time, and comes back on the other one."""
    (node,) = {_pod(cluster, "rollout")["spec"]["nodeName"]}
    cluster.plane.kubectl(
        "drain", node, "--ignore-daemonsets", "--delete-emptydir-data", "--timeout", "120s"
    )
    _wait_for(cluster, "deployment/rollout", "statefulset/learner", "statefulset/nats")
    pods = json.loads(_kubectl(cluster, "get", "pods", "-o", "json"))["items"]
    assert node not in {
        p["spec"]["nodeName"] for p in pods if "deletionTimestamp" not in p["metadata"]
    }
    cluster.plane.kubectl("uncordon", node)


def test_gpus_that_no_node_has_are_named(cluster: Cluster, release: Path, tmp_path: Path) -> None:
    file = tmp_path / "gpus.yaml"
    file.write_text(yaml.safe_dump({"rollout": {"replicas": 1, "gpu": {"count": 8}}}))
    cluster.helm("install", "lagwise-2", *_chart(cluster, release), "-f", str(file))
    try:
        said = ""
        deadline = time.monotonic() + 60
        while "Insufficient nvidia.com/gpu" not in said:
            assert time.monotonic() < deadline, said
            said = cluster.run(
                sys.executable, "-m", "shared.cli.main", "status",
                "--release", "lagwise-2", "--namespace", NAMESPACE, bound_s=60,
            )  # fmt: skip
            time.sleep(1)
        (line,) = [line for line in said.splitlines() if "nvidia.com/gpu" in line]
        assert "lagwise-2-rollout" in line
        assert "Pending" in line
    finally:
        cluster.helm("uninstall", "lagwise-2", "--namespace", NAMESPACE)
    # two releases side by side: the other one has not noticed
    assert "lagwise-1-learner-0" in _kubectl(cluster, "get", "pods", "-o", "name")


@pytest.mark.parametrize(
    ("allowed", "verb", "what"),
    [
        ("yes", "list", "pods"),
        ("yes", "patch", "pods"),
        ("no", "delete", "pods"),
        ("no", "create", "pods"),
        ("no", "get", "secrets"),
        ("no", "patch", "deployments.apps"),
    ],
)
def test_the_annotator_may_annotate_pods_and_nothing_else(
    cluster: Cluster, release: Path, allowed: str, verb: str, what: str
) -> None:
    account = _pod(cluster, "operator")["spec"]["serviceAccountName"]
    done = cluster.plane.kubectl(
        "auth", "can-i", verb, what, "--namespace", NAMESPACE,
        "--as", f"system:serviceaccount:{NAMESPACE}:{account}", check=False,
    )  # fmt: skip
    assert done.stdout.strip() == allowed, done.stderr


def test_no_other_pod_has_a_token(cluster: Cluster, release: Path) -> None:
    pods = json.loads(_kubectl(cluster, "get", "pods", "-o", "json"))["items"]
    with_token = {
        pod["metadata"]["labels"]["app.kubernetes.io/component"]
        for pod in pods
        for container in pod["spec"]["containers"]
        for mount in container.get("volumeMounts", [])
        if mount["mountPath"].startswith("/var/run/secrets/kubernetes.io")
    }
    assert with_token == {"operator"}


def _chart(cluster: Cluster, file: Path) -> tuple[str, ...]:
    example = ROOT / "examples/frozen_lake/values.yaml"
    return (str(cluster.chart), "-f", str(example), "-f", str(file), "-n", NAMESPACE, *FLAGS)


def _kubectl(cluster: Cluster, *arguments: str) -> str:
    return cluster.plane.kubectl("--namespace", NAMESPACE, *arguments).stdout


def _wait_for(cluster: Cluster, *workloads: str) -> None:
    for workload in workloads:
        kind, _, component = workload.partition("/")
        name = f"{kind}/lagwise-1-{component}"
        _kubectl(cluster, "rollout", "status", name, "--timeout", "120s")


def _pod(cluster: Cluster, component: str) -> Object:
    selector = f"app.kubernetes.io/instance=lagwise-1,app.kubernetes.io/component={component}"
    return json.loads(_kubectl(cluster, "get", "pods", "-l", selector, "-o", "json"))["items"][0]
