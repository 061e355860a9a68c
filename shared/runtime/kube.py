"""The Kubernetes API, as far as Lagwise uses it: pods of a release, their number, their cost.

The only module that imports the package `kubernetes` (extra `kube`), and only to run. Nothing
depends on it: without the package everything but `--release` of the command works.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from shared.runtime.errors import ConfigError

COST = "controller.kubernetes.io/pod-deletion-cost"
"""ReplicaSets delete the pods with the lowest cost first, after those that are not ready."""
SCALING = "lagwise.dev/scaling"
"""Annotation of the chart's Deployments: the autoscaling mode."""
TIMEOUT_S = 10.0

Json = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class PodView:
    """One pod, as far as it interests a user of Lagwise."""

    name: str
    role: str
    """As the services spell it: env_agents."""
    phase: str
    ready: bool
    reason: str
    """Why it is not running or not ready, as far as Kubernetes knows."""
    node: str
    image: str
    gpus: int
    restarts: int
    cost: str
    """Of deletion; empty when nobody set it."""


def pod_view(pod: Json) -> PodView:
    """Read a pod as the API writes it."""
    metadata, spec, status = pod["metadata"], pod["spec"], pod.get("status") or {}
    role = (metadata.get("labels") or {}).get("app.kubernetes.io/component", "")
    containers = cast("list[Json]", status.get("containerStatuses") or [])
    conditions = {c["type"]: c for c in cast("list[Json]", status.get("conditions") or [])}
    main = cast("list[Json]", spec["containers"])[0]
    return PodView(
        name=metadata["name"],
        role=role.replace("-", "_"),
        phase="Terminating" if metadata.get("deletionTimestamp") else status.get("phase", ""),
        ready=conditions.get("Ready", {}).get("status") == "True",
        reason=_reason(conditions, containers),
        node=spec.get("nodeName") or "",
        image=main["image"],
        gpus=_gpus(main),
        restarts=sum(int(c.get("restartCount", 0)) for c in containers),
        cost=(metadata.get("annotations") or {}).get(COST, ""),
    )


def _reason(conditions: Json, containers: list[Json]) -> str:
    scheduled = conditions.get("PodScheduled", {})
    if scheduled.get("status") == "False":
        return str(scheduled.get("message") or scheduled.get("reason") or "not scheduled")
    for container in containers:
        waiting = (container.get("state") or {}).get("waiting") or {}
        if waiting.get("reason"):
            return " ".join(filter(None, (waiting["reason"], waiting.get("message"))))
    ready = conditions.get("Ready", {})
    return "" if ready.get("status") == "True" else str(ready.get("message") or "")


def _gpus(container: Json) -> int:
    limits = cast("dict[str, str]", (container.get("resources") or {}).get("limits") or {})
    return sum(int(n) for name, n in limits.items() if name.partition("/")[2] == "gpu")


@dataclass(frozen=True, slots=True)
class Scaled:
    """What became of a wish for another number of pods."""

    name: str
    before: int
    after: int
    mode: str
    """The release's autoscaling mode."""


class Kube:
    """One namespace of the cluster that we run in, or that kubeconfig points at.

    Raises:
        ConfigError: the package is missing, or there is no cluster to talk to.
    """

    def __init__(self, namespace: str, *, host: str = "") -> None:
        self._client = _package("kubernetes.client")
        configuration = self._client.Configuration()
        if host:
            configuration.host = host
        else:
            _load(configuration)
        self._api = self._client.ApiClient(configuration)
        self._core = self._client.CoreV1Api(self._api)
        self._apps = self._client.AppsV1Api(self._api)
        self._namespace = namespace

    def pods(self, selector: str) -> list[PodView]:
        """Return the pods that a label selector finds, by name.

        Raises:
            ConfigError: the API server refuses or does not answer.
        """
        found = self._call(self._core.list_namespaced_pod, self._namespace, label_selector=selector)
        return sorted((pod_view(pod) for pod in found["items"]), key=lambda pod: pod.name)

    def scale(self, release: str, role: str, replicas: int) -> Scaled:
        """Set the number of pods of a role.

        Raises:
            ConfigError: no such Deployment, somebody else decides, or the API server refuses.
        """
        selector = release_selector(release, role)
        found = self._call(
            self._apps.list_namespaced_deployment, self._namespace, label_selector=selector
        )
        if not found["items"]:
            raise ConfigError(
                f"scale: no Deployment {selector} in namespace {self._namespace}: is --release "
                "right? (the learner is one process and does not scale)"
            )
        metadata = found["items"][0]["metadata"]
        mode = (metadata.get("annotations") or {}).get(SCALING, "none")
        if mode in ("hpa", "keda"):
            raise ConfigError(
                f"scale: {mode} decides the number of pods of {metadata['name']} and would undo "
                "this; set autoscaling.mode: external, or its bounds autoscaling."
                f"{role}.min and max"
            )
        before = int(found["items"][0]["spec"].get("replicas", 1))
        body = {"spec": {"replicas": replicas}}
        self._call(
            self._apps.patch_namespaced_deployment_scale, metadata["name"], self._namespace, body
        )
        return Scaled(metadata["name"], before, replicas, mode)

    def set_cost(self, pod: str, cost: int) -> None:
        """Annotate a pod with its deletion cost.

        Raises:
            ConfigError: the API server refuses or does not answer; a pod that is gone is no error.
        """
        body = {"metadata": {"annotations": {COST: str(cost)}}}
        self._call(self._core.patch_namespaced_pod, pod, self._namespace, body, gone_is_fine=True)

    def _call(self, act: Any, *arguments: Any, gone_is_fine: bool = False, **options: Any) -> Any:
        """Call and read the answer ourselves: the client's models refuse what they do not know."""
        exceptions = _package("kubernetes.client.exceptions")
        transport = _package("urllib3.exceptions")
        try:
            answer = act(*arguments, _request_timeout=TIMEOUT_S, _preload_content=False, **options)
            status, reason, body = answer.status, answer.reason, answer.data
        except exceptions.ApiException as error:
            status, reason, body = error.status, error.reason, error.body
        except transport.HTTPError as error:
            raise ConfigError(f"Kubernetes does not answer: {error}") from error
        if status == 404 and gone_is_fine:
            return {}
        if status >= 400:
            raise ConfigError(
                f"Kubernetes refuses ({status} {reason}) in namespace {self._namespace}: "
                f"{_message(body)}"
            )
        return json.loads(body)


def release_selector(release: str, role: str = "") -> str:
    """Return the labels of a release's pods, or of one role of them."""
    selector = f"app.kubernetes.io/instance={release}"
    if not role:
        return selector
    return f"{selector},app.kubernetes.io/component={role.replace('_', '-')}"


def _message(body: str | bytes) -> str:
    try:
        return str(json.loads(body)["message"])
    except (TypeError, ValueError, KeyError):
        return "no reason given"


def _load(configuration: Any) -> None:
    config = _package("kubernetes.config")
    try:
        try:
            config.load_incluster_config(client_configuration=configuration)
        except config.ConfigException:
            config.load_kube_config(client_configuration=configuration)
    except config.ConfigException as error:
        raise ConfigError(f"no Kubernetes cluster: {error} (KUBECONFIG?)") from error


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ConfigError(
            "talking to Kubernetes needs the package kubernetes: pip install 'lagwise[kube]'"
        ) from error
