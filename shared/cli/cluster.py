"""`lagwise status --release` and `lagwise scale`: a release on a Kubernetes cluster."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from shared.runtime.config import ROLES
from shared.runtime.errors import ConfigError
from shared.runtime.kube import Kube, PodView, Scaled, release_selector

ELASTIC = tuple(role for role in ROLES if role != "learner")


def pods(kube: Kube, release: str) -> list[PodView]:
    """Return the release's pods.

    Raises:
        ConfigError: there are none, or Kubernetes refuses.
    """
    found = kube.pods(release_selector(release))
    if not found:
        raise ConfigError(
            f"status: no pod of release {release}: are --release and --namespace right?"
        )
    return found


def table(found: Iterable[PodView]) -> str:
    """Return the pods as text: by role, what is Pending with its reason."""
    lines: list[str] = []
    for pod in sorted(found, key=lambda pod: (pod.role, pod.name)):
        state = "ready" if pod.ready else f"not ready: {pod.reason}" if pod.reason else "not ready"
        facts = (
            f"{pod.gpus} GPU" if pod.gpus else "",
            f"restarts {pod.restarts}" if pod.restarts else "",
            f"cost {pod.cost}" if pod.cost else "",
            pod.image.rpartition("/")[2],
        )
        shown = "  ".join(fact for fact in facts if fact)
        lines.append(f"  {pod.name:<40} {pod.phase:<11} {state}  {shown}")
    pending = [pod for pod in found if pod.phase == "Pending"]
    if gpus := sum(pod.gpus for pod in pending):
        lines.append(f"{len(pending)} pods Pending for want of {gpus} GPUs or room")
    return "\n".join(lines)


def as_dicts(found: Iterable[PodView]) -> list[dict[str, Any]]:
    """Return the pods as JSON-like content."""
    return [asdict(pod) for pod in found]


def scale(kube: Kube, release: str, role: str, replicas: int) -> str:
    """Set a role's number of pods; return what to say.

    Raises:
        ConfigError: the role does not scale, an autoscaler decides, or Kubernetes refuses.
    """
    if role not in ELASTIC:
        raise ConfigError(f"scale: {role} does not scale: one of {', '.join(ELASTIC)}")
    return said(kube.scale(release, role, replicas))


def said(scaled: Scaled) -> str:
    """Return one line, with a warning where the next upgrade would undo it."""
    line = f"{scaled.name}: {scaled.before} -> {scaled.after}"
    if scaled.mode == "none":
        line += " (until the next helm upgrade: autoscaling.mode external would keep it)"
    return line
