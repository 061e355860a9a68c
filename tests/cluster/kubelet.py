"""Nodes of a control plane whose pods are processes of this machine.

Does what kubelets do: starts what the scheduler bound to its nodes, probes, restarts, reports, and
ends a deleted pod within its grace period. The processes are those of `tests.charts.local_pods`.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

from shared.runtime.nats_server import free_port
from tests.charts.local_pods import Container, Pod
from tests.charts.rendering import Object

# The package has no types.
client: Any = import_module("kubernetes.client")
config: Any = import_module("kubernetes.config")
ApiException: Any = client.exceptions.ApiException

GPU = "nvidia.com/gpu"
TICK_S = 0.2


@dataclass
class Bound:
    """A pod that the scheduler gave to us."""

    object: Object
    started_at: str
    pod: Pod | None = None
    """Once its init containers are through."""
    failure: str = ""
    reported: str = ""
    leaving: bool = False
    threads: list[threading.Thread] = field(default_factory=list)


class Release:
    """What the pods of one release see of the cluster; there is no cluster DNS."""

    def __init__(self, core: Any, folder: Path, namespace: str) -> None:
        self.folder = folder
        self.nats_ports = {4222: free_port(), 8222: free_port()}
        self.addresses: dict[str, str] = {}
        self._core, self._namespace = core, namespace

    def find(self, kind: str, name: str) -> Any:
        """Return what a pod mounts."""
        read = {
            "ConfigMap": self._core.read_namespaced_config_map,
            "Secret": self._core.read_namespaced_secret,
        }[kind]
        return _json(read(name, self._namespace, _preload_content=False))

    def find_bus(self, release: str) -> None:
        """The bus's name stands for its address."""
        services = _json(
            self._core.list_namespaced_service(
                self._namespace,
                label_selector=f"app.kubernetes.io/instance={release}",
                _preload_content=False,
            )
        )["items"]
        for service in services:
            part = service["metadata"]["labels"].get("app.kubernetes.io/component")
            if part == "nats" and service["spec"].get("clusterIP") != "None":
                self.addresses = {
                    f"{service['metadata']['name']}:4222": f"127.0.0.1:{self.nats_ports[4222]}",
                    "port: 4222": f"listen: 127.0.0.1:{self.nats_ports[4222]}",
                    "http_port: 8222": f"http: 127.0.0.1:{self.nats_ports[8222]}",
                }


class Kubelet:
    """All nodes at once.

    Args:
        kubeconfig: of an administrator.
        folder: logs and volumes of the pods.
        nodes: name -> GPUs.
        sidecars: init containers to keep running beside the others (`restartPolicy: Always`);
            API servers before 1.29 drop the field.
    """

    def __init__(
        self, kubeconfig: Path, folder: Path, *, nodes: dict[str, int], sidecars: Iterable[str] = ()
    ) -> None:
        self.folder = folder
        self._releases: dict[tuple[str, str], Release] = {}
        self._nodes, self._sidecars = nodes, frozenset(sidecars)
        self._core = client.CoreV1Api(config.new_client_from_config(str(kubeconfig)))
        self._pods: dict[str, Bound] = {}
        self._stop = threading.Event()
        self.problem = ""
        for name, gpus in nodes.items():
            self._register(name, gpus)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop looking, then end what runs."""
        self._stop.set()
        self._thread.join(30)
        for bound in self._pods.values():
            for thread in bound.threads:
                thread.join(60)
            if bound.pod is not None and not bound.leaving:
                bound.pod.delete()

    def log_of(self, pod: str) -> str:
        """The end of every container's output."""
        files = sorted((self.folder / pod).glob("*.log"))
        return "\n".join(f"--- {f.name}\n{f.read_text()[-1500:]}" for f in files)

    # --- nodes
    def _register(self, name: str, gpus: int) -> None:
        capacity = {"cpu": "64", "memory": "256Gi", "pods": "110", GPU: str(gpus)}
        now = _now()
        ready = {
            "type": "Ready",
            "status": "True",
            "reason": "KubeletReady",
            "lastHeartbeatTime": now,
            "lastTransitionTime": now,
        }
        self._core.create_node({"metadata": {"name": name}})
        status = {"capacity": capacity, "allocatable": capacity, "conditions": [ready]}
        self._core.patch_node_status(name, {"status": status})

    # --- pods
    def _run(self) -> None:
        while not self._stop.wait(TICK_S):
            try:
                self._look()
            except Exception as error:
                self.problem = f"{type(error).__name__}: {error}"

    def _look(self) -> None:
        listed = _json(self._core.list_pod_for_all_namespaces(_preload_content=False))
        seen: set[str] = set()
        for pod in listed["items"]:
            uid = pod["metadata"]["uid"]
            if pod["spec"].get("nodeName") not in self._nodes:
                continue
            seen.add(uid)
            if uid not in self._pods:
                if pod["metadata"].get("deletionTimestamp"):
                    self._forget(pod)
                    continue
                self._begin(pod)
            bound = self._pods[uid]
            if pod["metadata"].get("deletionTimestamp") and not bound.leaving:
                bound.leaving = True
                grace_s = pod["metadata"].get("deletionGracePeriodSeconds", 30)
                self._in_thread(bound, self._end, bound, grace_s)
            self._report(bound)
        for uid in self._pods.keys() - seen:
            bound = self._pods[uid]
            if not bound.leaving:  # deleted with force: nobody asked us
                bound.leaving = True
                self._in_thread(bound, self._end, bound, 0)

    def _in_thread(self, bound: Bound, target: Any, *arguments: Any) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        bound.threads.append(thread)
        thread.start()

    def _begin(self, pod: Object) -> None:
        for container in pod["spec"].get("initContainers", []):
            if container["name"] in self._sidecars:
                container["restartPolicy"] = "Always"
        bound = self._pods[pod["metadata"]["uid"]] = Bound(pod, _now())
        self._in_thread(bound, self._start, bound, self._release_of(pod))

    def _start(self, bound: Bound, release: Release) -> None:
        name = bound.object["metadata"]["name"]
        folder = self.folder / name
        if folder.exists():  # an earlier pod of a StatefulSet; its logs are kept
            folder.rename(self.folder / f"{name}.{len(list(self.folder.glob(f'{name}.*')))}")
        try:
            bound.pod = Pod(release, {**bound.object, "kind": "Pod"}, name)
        except Exception as error:
            bound.failure = f"{type(error).__name__}: {error}"[:1000]

    def _release_of(self, pod: Object) -> Release:
        metadata = pod["metadata"]
        name = metadata.get("labels", {}).get("app.kubernetes.io/instance", "")
        key = (metadata["namespace"], name)
        if key not in self._releases:
            self._releases[key] = Release(self._core, self.folder, metadata["namespace"])
        self._releases[key].find_bus(name)
        return self._releases[key]

    def _end(self, bound: Bound, grace_s: float) -> None:
        bound.threads[0].join(60)
        if bound.pod is not None:
            bound.pod.spec["terminationGracePeriodSeconds"] = grace_s
            bound.pod.delete()
        self._forget(bound.object)

    def _forget(self, pod: Object) -> None:
        metadata = pod["metadata"]
        body = {"gracePeriodSeconds": 0, "preconditions": {"uid": metadata["uid"]}}
        with contextlib.suppress(ApiException):
            self._core.delete_namespaced_pod(metadata["name"], metadata["namespace"], body=body)

    # --- status
    def _report(self, bound: Bound) -> None:
        status = _status(bound)
        written = json.dumps(status, sort_keys=True)
        if written == bound.reported:
            return
        metadata = bound.object["metadata"]
        try:
            self._core.patch_namespaced_pod_status(
                metadata["name"], metadata["namespace"], {"status": status}
            )
        except ApiException as error:
            if error.status not in (404, 409):
                raise
        bound.reported = written


def _status(bound: Bound) -> Object:
    pod = bound.pod
    common = {"hostIP": "127.0.0.1", "startTime": bound.started_at}
    if bound.failure:
        return {**common, "phase": "Failed", "reason": "StartError", "message": bound.failure}
    if pod is None:
        return {**common, "phase": "Pending"}
    init = {c["name"] for c in pod.spec.get("initContainers", [])}
    containers = [c for c in pod.containers if c.name not in init]
    never = pod.spec.get("restartPolicy") == "Never"
    exits = [c.exits[0] if c.exits else c.process.poll() for c in containers] if never else [None]
    if all(code is not None for code in exits):
        phase = "Succeeded" if not any(exits) else "Failed"
    else:
        phase = "Running"
    ready = phase == "Running" and all(_ready(c) for c in containers)
    return {
        **common,
        "phase": phase,
        "podIP": pod.ip,
        "podIPs": [{"ip": pod.ip}],
        "conditions": [
            _condition("Initialized", True),
            _condition("ContainersReady", ready),
            _condition("Ready", ready),
        ],
        "containerStatuses": [
            _container_status(c, bound.started_at, exits[i] if never else None)
            for i, c in enumerate(containers)
        ],
    }


def _ready(container: Container) -> bool:
    if container.process.poll() is not None:
        return False
    return container.probes.ready if "readinessProbe" in container.spec else True


def _condition(kind: str, holds: bool) -> Object:
    return {"type": kind, "status": str(holds), "lastProbeTime": None}


def _container_status(container: Container, started_at: str, exit_code: int | None) -> Object:
    if exit_code is None:
        state: Object = {"running": {"startedAt": started_at}}
    else:
        state = {"terminated": {"exitCode": exit_code, "startedAt": started_at}}
    return {
        "name": container.name,
        "image": container.spec["image"],
        "imageID": "",
        "ready": exit_code is None and _ready(container),
        "started": True,
        "restartCount": len(container.exits),
        "state": state,
    }


def _json(response: Any) -> Any:
    return json.loads(response.data)


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
