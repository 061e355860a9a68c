"""What a kubelet does, on this machine: rendered containers as processes, with rendered probes.

Every container runs its exact command, arguments, environment and mounted files. What the machine
cannot give is replaced in one place each: mount paths become folders, the bus's service name an
address, a pod's network namespace a loopback address of its own (`LAGWISE_TELEMETRY__HOST`).
"""

from __future__ import annotations

import base64
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, Protocol

from shared.runtime import nats_server
from tests.charts.rendering import ROOT, Object, component_of, pod_spec

_addresses = count(2)


@dataclass
class Probes:
    """What the kubelet heard of one container."""

    started_after_s: float | None = None
    ready: bool = False
    ready_polls: int = 0
    live_polls: int = 0
    live_failures: list[str] = field(default_factory=list)
    verdicts: list[str] = field(default_factory=list)
    """Restarts a kubelet would have ordered."""


class Container:
    """One process of a pod."""

    def __init__(self, pod: Pod, spec: Object) -> None:
        self.pod, self.spec, self.name = pod, spec, spec["name"]
        self.probes = Probes()
        self.exits: list[int] = []
        self.log = pod.folder / f"{self.name}.log"
        self._stopping = threading.Event()
        self._argv, self._environment = pod.command(spec)
        self._start()
        self._threads = [threading.Thread(target=self._keep, daemon=True)]
        if "startupProbe" in spec:
            self._threads.append(threading.Thread(target=self._probe, daemon=True))
        for thread in self._threads:
            thread.start()

    def _start(self) -> None:
        self.started_at = time.monotonic()
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self._argv, env=self._environment, cwd=ROOT, stdin=subprocess.DEVNULL,
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def _keep(self) -> None:
        """Start it again whenever it ends, unless the pod's restartPolicy is Never."""
        while not self._stopping.wait(0.2):
            if self.process.poll() is not None:
                self.exits.append(self.process.returncode)
                if self.pod.spec.get("restartPolicy") == "Never":
                    return
                time.sleep(1.0)
                if not self._stopping.is_set():
                    self._start()

    # --- probes
    def _ask(self, probe: Object) -> str:
        ports = {p["name"]: p["containerPort"] for p in self.spec["ports"]}
        wanted = probe["httpGet"]["port"]
        address = self.pod.address_of(ports.get(wanted, wanted))
        try:
            url = f"http://{address}{probe['httpGet']['path']}"
            with urllib.request.urlopen(url, timeout=probe["timeoutSeconds"]):
                return ""
        except urllib.error.HTTPError as error:
            return error.read().decode().strip() or str(error)
        except OSError as error:
            return str(error)

    def _probe(self) -> None:
        startup = self.spec["startupProbe"]
        failures = 0
        while (problem := self._ask(startup)) and not self._stopping.is_set():
            failures += 1
            if failures >= startup["failureThreshold"]:
                self.probes.verdicts.append(f"startup: {problem}")
                return
            self._stopping.wait(startup["periodSeconds"])
        self.probes.started_after_s = time.monotonic() - self.started_at
        next_at = {"readinessProbe": 0.0, "livenessProbe": 0.0}
        in_a_row = dict.fromkeys(next_at, 0)
        while not self._stopping.wait(0.1):
            for name in next_at:
                probe = self.spec[name]
                if time.monotonic() < next_at[name]:
                    continue
                next_at[name] = time.monotonic() + probe["periodSeconds"]
                problem = self._ask(probe)
                if self._stopping.is_set():
                    return
                in_a_row[name] = in_a_row[name] + 1 if problem else 0
                failed = in_a_row[name] >= probe["failureThreshold"]
                if name == "readinessProbe":
                    self.probes.ready_polls += 1
                    self.probes.ready = not problem or (self.probes.ready and not failed)
                else:
                    self.probes.live_polls += 1
                    if problem:
                        self.probes.live_failures.append(problem)
                    if failed:
                        self.probes.verdicts.append(f"liveness: {problem}")

    # --- the end
    def terminate(self) -> None:
        self._stopping.set()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)

    def wait(self, bound_s: float) -> tuple[int, bool]:
        """Exit code, and whether it had to be killed."""
        try:
            return self.process.wait(max(0.1, bound_s)), False
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait(), True


class Host(Protocol):
    """What pods run on."""

    folder: Path
    """Holds the pods' folders and the claims' volumes."""
    nats_ports: dict[int, int]
    addresses: dict[str, str]
    """Texts of rendered files that stand for something else here."""

    def find(self, kind: str, name: str) -> Any:
        """Return a ConfigMap or a Secret."""
        ...


class Pod:
    """A pod of a rendered workload; its folder holds its volumes and logs."""

    def __init__(self, cluster: Host, owner: Object, name: str) -> None:
        self.cluster, self.owner, self.name = cluster, owner, name
        self.spec = pod_spec(owner)
        self.component = component_of(owner)
        self.ip = f"127.1.0.{next(_addresses)}"
        self.folder = cluster.folder / name
        self.folder.mkdir(parents=True)
        self._volumes = self._make_volumes()
        containers = [*self.spec.get("initContainers", []), *self.spec["containers"]]
        for container in containers:
            self._fill(container)
        self.containers: list[Container] = []
        for container in self.spec.get("initContainers", []):
            if container.get("restartPolicy") == "Always":
                self.containers.append(Container(self, container))
            else:
                argv, environment = self.command(container)
                done = subprocess.run(
                    argv, env=environment, cwd=ROOT, capture_output=True, text=True
                )
                assert done.returncode == 0, done.stderr
        self.containers += [Container(self, container) for container in self.spec["containers"]]
        self.main = self.containers[-1]

    # --- volumes
    def _make_volumes(self) -> dict[str, Path]:
        claims = {
            c["metadata"]["name"]: None for c in self.owner["spec"].get("volumeClaimTemplates", [])
        }
        volumes = {}
        for name in claims:
            volumes[name] = self.cluster.folder / "claims" / f"{name}-{self.name}"
        for volume in self.spec.get("volumes", []):
            if claim := volume.get("persistentVolumeClaim"):
                folder = self.cluster.folder / "claims" / claim["claimName"]
            else:
                folder = self.folder / "volumes" / volume["name"]
            volumes[volume["name"]] = folder
        for path in volumes.values():
            path.mkdir(parents=True, exist_ok=True)
        return volumes

    def _fill(self, container: Object) -> None:
        """Write the files of ConfigMaps and Secrets that the container mounts."""
        mounts = {m["name"] for m in container.get("volumeMounts", [])}
        for volume in self.spec.get("volumes", []):
            if volume["name"] not in mounts:
                continue
            folder = self._volumes[volume["name"]]
            if source := volume.get("configMap"):
                for file, content in self.cluster.find("ConfigMap", source["name"])["data"].items():
                    (folder / file).write_text(self.translate(content, container))
            elif source := volume.get("secret"):
                data = self.cluster.find("Secret", source["secretName"])["data"]
                for item in source["items"]:
                    path = folder / item["path"]
                    path.write_bytes(base64.b64decode(data[item["key"]]))

    def translate(self, text: str, container: Object) -> str:
        """Mount paths to folders, service names to addresses; in one pass."""
        mounted = container.get("volumeMounts", [])
        mounts = {m["mountPath"]: str(self._volumes[m["name"]]) for m in mounted}
        swaps = {**mounts, **self.cluster.addresses}
        ordered = sorted(swaps, key=len, reverse=True)
        pattern = "|".join(rf"(?<![\w/.-]){re.escape(key)}(?![\w-])" if key.startswith("/")
                           else re.escape(key) for key in ordered)  # fmt: skip
        return re.sub(pattern, lambda match: swaps[match[0]], text)

    # --- processes
    def command(self, container: Object) -> tuple[list[str], dict[str, str]]:
        environment = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "LAGWISE_TELEMETRY__HOST": self.ip,
            "OMP_NUM_THREADS": "1",  # a container would see its CPU limit
            "OMP_WAIT_POLICY": "PASSIVE",
        }
        for entry in container.get("env", []):
            environment[entry["name"]] = self._value(entry, environment, container)
        argv = [*container["command"], *container.get("args", [])]
        argv = [_expand(self.translate(word, container), environment) for word in argv]
        if argv[0] == "python":
            argv[0] = sys.executable
        elif argv[0] == "nats-server":
            argv[0] = str(nats_server.find_binary())
        return argv, environment

    def _value(self, entry: Object, environment: dict[str, str], container: Object) -> str:
        source = entry.get("valueFrom")
        if source is None:
            return _expand(self.translate(str(entry.get("value", "")), container), environment)
        if "fieldRef" in source:
            namespace = self.owner["metadata"].get("namespace", "default")
            return {"metadata.name": self.name, "metadata.namespace": namespace}[
                source["fieldRef"]["fieldPath"]
            ]
        reference = source["secretKeyRef"]
        data = self.cluster.find("Secret", reference["name"])["data"]
        return base64.b64decode(data[reference["key"]]).decode()

    def address_of(self, port: int) -> str:
        if self.component == "nats":
            return f"127.0.0.1:{self.cluster.nats_ports[port]}"
        return f"{self.ip}:{port}"

    def delete(self) -> dict[str, tuple[int, bool]]:
        """SIGTERM, then SIGKILL after the rendered grace period; sidecars end last."""
        grace_s = self.spec["terminationGracePeriodSeconds"]
        deadline = time.monotonic() + grace_s
        self.main.terminate()
        ends = {self.main.name: self.main.wait(grace_s)}
        for sidecar in self.containers[:-1]:
            sidecar.terminate()
            ends[sidecar.name] = sidecar.wait(deadline - time.monotonic())
        return ends


class LocalPods:
    """Every workload of a rendered release."""

    def __init__(self, objects: list[Object], folder: Path, *, replicas: dict[str, int]) -> None:
        self.objects, self.folder = objects, folder
        self.nats_ports = {4222: nats_server.free_port(), 8222: nats_server.free_port()}
        host = next(
            o["metadata"]["name"]
            for o in objects
            if o["kind"] == "Service" and component_of(o) == "nats" and "clusterIP" not in o["spec"]
        )
        self.addresses = {
            f"{host}:4222": f"127.0.0.1:{self.nats_ports[4222]}",
            "port: 4222": f"listen: 127.0.0.1:{self.nats_ports[4222]}",
            "http_port: 8222": f"http: 127.0.0.1:{self.nats_ports[8222]}",
        }
        self._owners = {
            component_of(o): o for o in objects if o["kind"] in ("Deployment", "StatefulSet")
        }
        self.pods: dict[str, list[Pod]] = {name: [] for name in self._owners}
        self._names = {name: count() for name in self._owners}
        self.ends: dict[str, dict[str, tuple[int, bool]]] = {}
        for component in ("nats", "learner", "logit-oracle", "rollout", "env-agents"):
            self.scale(component, replicas.get(component, 1))

    def find(self, kind: str, name: str) -> Any:
        return next(o for o in self.objects if o["kind"] == kind and o["metadata"]["name"] == name)

    def scale(self, component: str, replicas: int) -> None:
        """Start pods, or delete the newest ones, all at once."""
        pods, owner = self.pods[component], self._owners[component]
        while len(pods) < replicas:
            name = f"{owner['metadata']['name']}-{next(self._names[component])}"
            pods.append(Pod(self, owner, name))
        leaving = [pods.pop() for _ in range(len(pods) - replicas)]
        threads = [threading.Thread(target=self._delete, args=(pod,)) for pod in leaving]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _delete(self, pod: Pod) -> None:
        self.ends[pod.name] = pod.delete()

    def close(self) -> None:
        for component in ("env-agents", "rollout", "logit-oracle", "learner", "nats"):
            if component in self.pods:
                self.scale(component, 0)

    def ready(self, component: str) -> int:
        return sum(pod.main.probes.ready for pod in self.pods[component])


def _expand(text: str, environment: dict[str, str]) -> str:
    return re.sub(r"\$\((\w+)\)", lambda match: environment[match[1]], text)
