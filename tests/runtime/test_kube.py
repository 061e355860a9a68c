"""The Kubernetes API as Lagwise uses it: pods read, scaled, annotated; refusals in one line."""

from __future__ import annotations

import json
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from shared.cli import cluster
from shared.cli.main import main
from shared.runtime import kube as kube_module
from shared.runtime.errors import ConfigError
from shared.runtime.kube import COST, Kube, pod_view, release_selector


def pod(name: str, role: str = "rollout", **changes: Any) -> dict[str, Any]:
    made: dict[str, Any] = {
        "metadata": {
            "name": name,
            "labels": {"app.kubernetes.io/component": role, "app.kubernetes.io/instance": "r"},
        },
        "spec": {
            "containers": [
                {
                    "name": role,
                    "image": "registry.example.com/lagwise-rollout:0.1.0",
                    "resources": {"limits": {"nvidia.com/gpu": "2", "memory": "1Gi"}},
                }
            ],
            "nodeName": "node-1",
        },
        "status": {
            "phase": "Running",
            "conditions": [{"type": "Ready", "status": "True"}],
            "containerStatuses": [{"restartCount": 2, "state": {"running": {}}}],
        },
    }
    for key, value in changes.items():
        made[key] = {**made[key], **value}
    return made


PENDING = pod(
    "r-rollout-2",
    status={
        "phase": "Pending",
        "containerStatuses": None,
        "conditions": [
            {
                "type": "PodScheduled",
                "status": "False",
                "reason": "Unschedulable",
                "message": "0/3 nodes are available: 3 Insufficient nvidia.com/gpu.",
            }
        ],
    },
)


def test_a_running_pod_shows_role_gpus_image_and_restarts():
    view = pod_view(pod("r-1", "env-agents"))
    assert (view.role, view.phase, view.ready, view.gpus, view.restarts) == (
        "env_agents",
        "Running",
        True,
        2,
        2,
    )
    assert view.reason == ""


def test_a_pending_pod_says_what_the_scheduler_says():
    view = pod_view(PENDING)
    assert (view.phase, view.ready) == ("Pending", False)
    assert "Insufficient nvidia.com/gpu" in view.reason
    text = cluster.table([view])
    assert "Insufficient nvidia.com/gpu" in text
    assert "1 pods Pending for want of 2 GPUs" in text


def test_a_container_that_waits_and_a_pod_that_goes_say_so():
    waiting = {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}
    view = pod_view(pod("a", status={"conditions": [], "containerStatuses": [{"state": waiting}]}))
    assert view.reason == "ImagePullBackOff no such image"
    leaving = pod("b")
    leaving["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    assert pod_view(leaving).phase == "Terminating"


def test_selectors_name_release_and_role():
    assert release_selector("r", "env_agents") == (
        "app.kubernetes.io/instance=r,app.kubernetes.io/component=env-agents"
    )


def test_without_the_package_the_command_says_what_to_install(monkeypatch, capsys):
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(kube_module.importlib, "import_module", missing)
    assert main(["scale", "rollout", "3", "--release", "r"]) == 2
    assert "lagwise[kube]" in capsys.readouterr().err


# --- over HTTP, with the real client
class ApiServer:
    """Answers like the API server to the five calls that are used; remembers what was written."""

    def __init__(self) -> None:
        self.pods = [pod("r-rollout-1"), PENDING]
        self.deployment: dict[str, Any] = {
            "metadata": {
                "name": "r-lagwise-rollout",
                "annotations": {"lagwise.dev/scaling": "external"},
            },
            "spec": {"replicas": 2},
        }
        self.refuse = 0
        self.seen: list[tuple[str, str, Any]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def _serve(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(length)) if length else None
                if self.command == "PATCH":
                    assert self.headers["Content-Type"].endswith("merge-patch+json")
                outer.seen.append((self.command, self.path, body))
                status, answer = outer.answer(self.command, self.path, body)
                content = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_PATCH = _serve

            def log_message(self, *_: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def answer(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        if self.refuse:
            return self.refuse, {"message": "pods is forbidden: no, you may not"}
        if path.startswith("/api/v1/namespaces/ns/pods?"):
            return 200, {"kind": "PodList", "apiVersion": "v1", "items": self.pods}
        if path.startswith("/apis/apps/v1/namespaces/ns/deployments?"):
            found = [self.deployment] if "component%3Drollout" in path else []
            return 200, {"kind": "DeploymentList", "apiVersion": "apps/v1", "items": found}
        if path == "/apis/apps/v1/namespaces/ns/deployments/r-lagwise-rollout/scale":
            self.deployment["spec"]["replicas"] = body["spec"]["replicas"]
            return 200, {"kind": "Scale", "spec": body["spec"]}
        if path == "/api/v1/namespaces/ns/pods/r-rollout-1":
            return 200, self.pods[0]
        return 404, {"message": f"{method} {path} not found"}

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def api() -> Iterator[ApiServer]:
    server = ApiServer()
    yield server
    server.close()


@pytest.fixture
def kube(api: ApiServer) -> Kube:
    return Kube("ns", host=api.url)


@pytest.mark.chart
def test_pods_of_a_release_are_read_by_label(api: ApiServer, kube: Kube):
    assert [p.name for p in cluster.pods(kube, "r")] == ["r-rollout-1", "r-rollout-2"]
    assert "labelSelector=app.kubernetes.io/instance=r" in urllib.parse.unquote(api.seen[0][1])


@pytest.mark.chart
def test_no_pod_at_all_asks_whether_the_names_are_right(api: ApiServer, kube: Kube):
    api.pods = []
    with pytest.raises(ConfigError, match="release r"):
        cluster.pods(kube, "r")


@pytest.mark.chart
def test_scaling_patches_the_scale_subresource(api: ApiServer, kube: Kube):
    assert cluster.scale(kube, "r", "rollout", 6) == "r-lagwise-rollout: 2 -> 6"
    assert api.deployment["spec"]["replicas"] == 6
    assert api.seen[-1][0] == "PATCH"


@pytest.mark.chart
def test_a_fixed_number_is_set_with_a_warning_and_an_autoscalers_is_not(api: ApiServer, kube: Kube):
    api.deployment["metadata"]["annotations"] = {"lagwise.dev/scaling": "none"}
    assert "until the next helm upgrade" in cluster.scale(kube, "r", "rollout", 3)
    api.deployment["metadata"]["annotations"] = {"lagwise.dev/scaling": "hpa"}
    with pytest.raises(ConfigError, match="hpa decides"):
        cluster.scale(kube, "r", "rollout", 5)
    assert api.deployment["spec"]["replicas"] == 3


@pytest.mark.chart
def test_what_cannot_be_scaled_is_named(kube: Kube):
    with pytest.raises(ConfigError, match="learner does not scale"):
        cluster.scale(kube, "r", "learner", 2)
    with pytest.raises(ConfigError, match="no Deployment"):
        cluster.scale(kube, "r", "logit_oracle", 2)


@pytest.mark.chart
def test_a_cost_is_an_annotation_and_a_pod_that_is_gone_is_no_error(api: ApiServer, kube: Kube):
    kube.set_cost("r-rollout-1", 7)
    assert api.seen[-1][2] == {"metadata": {"annotations": {COST: "7"}}}
    kube.set_cost("r-rollout-9", 7)


@pytest.mark.chart
def test_a_refusal_and_a_silent_server_are_one_line(api: ApiServer, kube: Kube):
    api.refuse = 403
    with pytest.raises(ConfigError, match=r"403 .*namespace ns: pods is forbidden"):
        kube.pods("a=b")
    nobody = Kube("ns", host="http://127.0.0.1:9")
    with pytest.raises(ConfigError, match="does not answer"):
        nobody.pods("a=b")
