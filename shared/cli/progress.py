"""What a run looks like right now, from its leases, step reports and process events. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from shared.wire.telemetry import Lease, StepReport

WINDOW = 8
"""Step reports that success and staleness are averaged over."""

EVENTS_SHOWN = 6

MIN_GAP_S = 1.5
"""Rates are taken over at least so long: services count in steps of about a second."""

GENERATED_COUNTER = "sampled_tokens"
"""Counter of the rollouts' leases."""


@dataclass(frozen=True)
class Service:
    """One process as its leases describe it."""

    pod: str
    role: str
    version: int
    ready: bool
    reason: str
    busy_share: float
    """Own work over wall time since its lease before, 0..1."""
    tokens_per_s: float
    """Generated, for rollouts."""


@dataclass(frozen=True)
class Snapshot:
    """One picture."""

    elapsed_s: float
    version: int
    versions: int
    success: float | None
    """Mean over the trained trajectories of the last steps."""
    staleness_mean: float | None
    staleness_max: float | None
    """Largest so far."""
    staleness_bound: int
    tickets: int
    """In the ticket stream."""
    backlog: int
    """Trajectories waiting for their scores."""
    generated_per_s: float
    trained_per_s: float
    services: tuple[Service, ...]
    restarts: int
    events: tuple[tuple[float, str, bool], ...]
    """(elapsed seconds, text, is alarming), oldest first."""


@dataclass
class _Pod:
    lease: Lease
    busy_share: float = 0.0
    tokens_per_s: float = 0.0
    seen_at: float = 0.0


@dataclass
class Progress:
    """Takes in what happens, gives snapshots; all times are Unix seconds."""

    started_at: float
    versions: int
    staleness_bound: int
    lease_expiry_s: float = 6.0
    tickets: int = 0
    version: int = -1
    """Newest published, -1 before the first."""
    training_started_at: float | None = None
    """When the first step reported began."""
    _pods: dict[str, _Pod] = field(default_factory=dict[str, _Pod])
    _steps: deque[StepReport] = field(default_factory=lambda: deque[StepReport](maxlen=WINDOW))
    _staleness_max: float | None = None
    _restarts: int = 0
    _events: deque[tuple[float, str, bool]] = field(
        default_factory=lambda: deque[tuple[float, str, bool]](maxlen=EVENTS_SHOWN)
    )
    _returning: set[str] = field(default_factory=set[str])

    def on_lease(self, lease: Lease, at: float) -> str | None:
        """Take a lease; return a line when it shows that a restarted process serves again."""
        known = self._pods.get(lease.pod)
        pod = _Pod(lease, seen_at=at)
        if known is not None and known.lease.incarnation == lease.incarnation:
            pod.busy_share, pod.tokens_per_s = known.busy_share, known.tokens_per_s
            passed_s = lease.sent_at - known.lease.sent_at
            if passed_s >= MIN_GAP_S:
                pod.busy_share = _clipped((lease.busy_s - known.lease.busy_s) / passed_s)
                pod.tokens_per_s = (_generated(lease) - _generated(known.lease)) / passed_s
            else:
                pod.lease = lease.model_copy(
                    update={
                        "sent_at": known.lease.sent_at,
                        "busy_s": known.lease.busy_s,
                        "counters": known.lease.counters,
                    }
                )
        self._pods[lease.pod] = pod
        if lease.role == "learner":
            self.version = max(self.version, lease.version)
        if lease.ready and lease.pod in self._returning:
            self._returning.discard(lease.pod)
            serving = f", serving version {lease.version}" if lease.version >= 0 else ""
            return self._note(at, f"{lease.pod} is back{serving}", alarming=False)
        return None

    def on_step(self, report: StepReport) -> None:
        self._steps.append(report)
        if self.training_started_at is None:
            self.training_started_at = report.started_at
        self.version = max(self.version, report.version)
        oldest = report.scalars.get("staleness_max")
        if oldest is not None:
            self._staleness_max = max(oldest, self._staleness_max or 0.0)

    def on_event(self, event: Mapping[str, Any]) -> str | None:
        """Take a line of `events.jsonl`; return it as text when it is worth showing."""
        pod, at = str(event["pod"]), float(event["at"])
        match event["event"]:
            case "kill":
                self._returning.add(pod)
                return self._note(
                    at, f"KILL -9 {pod} (pid {event['pid']}) at version {self.version}"
                )
            case "hung":
                return self._note(at, f"{pod} is silent: {event['cause']}; killing it")
            case "exited" if event["code"] != 0:
                self.forget(pod)
                return self._note(at, f"{pod} died: {event['cause']}")
            case "started" if event["restart"]:
                self._restarts += 1
                self._returning.add(pod)
                return self._note(at, f"{pod} restarted (pid {event['pid']})", alarming=False)
            case "finished":
                return self._note(at, f"stopped: {event['reason']}", alarming=event["code"] != 0)
            case _:
                return None

    def snapshot(self, at: float) -> Snapshot:
        """Return the picture at a time."""
        fresh = [p for p in self._pods.values() if at - p.seen_at <= self.lease_expiry_s]
        services = tuple(
            Service(
                pod=p.lease.pod,
                role=p.lease.role,
                version=p.lease.version,
                ready=p.lease.ready,
                reason=p.lease.reason,
                busy_share=p.busy_share,
                tokens_per_s=p.tokens_per_s,
            )
            for p in sorted(fresh, key=lambda p: p.lease.pod)
        )
        backlog = sum(p.lease.gauges.get("unscored_trajectories", 0.0) for p in fresh)
        return Snapshot(
            elapsed_s=at - self.started_at,
            version=self.version,
            versions=self.versions,
            success=self._mean("success"),
            staleness_mean=self._mean("staleness_mean"),
            staleness_max=self._staleness_max,
            staleness_bound=self.staleness_bound,
            tickets=self.tickets,
            backlog=int(backlog),
            generated_per_s=sum(s.tokens_per_s for s in services if s.role == "rollout"),
            trained_per_s=self._trained_per_s(),
            services=services,
            restarts=self._restarts,
            events=tuple(self._events),
        )

    def silent(self, at: float, bound_s: float) -> list[str]:
        """Return pods that once renewed their lease and have not for `bound_s`.

        Nobody is, while no one is heard: then it is the bus that is silent.
        """
        ages = {pod: at - known.seen_at for pod, known in self._pods.items()}
        if min(ages.values(), default=bound_s) > self.lease_expiry_s:
            return []
        return sorted(pod for pod, age in ages.items() if age > bound_s)

    def forget(self, pod: str) -> None:
        """Drop what is known of a process that is gone."""
        self._pods.pop(pod, None)

    def _note(self, at: float, text: str, *, alarming: bool = True) -> str:
        self._events.append((at - self.started_at, text, alarming))
        return text

    def _mean(self, name: str) -> float | None:
        values = [step.scalars[name] for step in self._steps if name in step.scalars]
        return sum(values) / len(values) if values else None

    def _trained_per_s(self) -> float:
        if len(self._steps) < 2:
            return 0.0
        later = list(self._steps)[1:]
        passed_s = later[-1].published_at - self._steps[0].published_at
        tokens = sum(step.scalars.get("tokens_trained", 0.0) for step in later)
        return tokens / passed_s if passed_s > 0 else 0.0


def plain_line(shot: Snapshot) -> str:
    """Return one line for a log or a pipe."""
    busy = " ".join(f"{s.pod} {s.busy_share:.0%}" for s in shot.services)
    return (
        f"[{shot.elapsed_s:6.1f}s] version {max(shot.version, 0)}/{shot.versions}"
        f"  success {_shown(shot.success)}"
        f"  staleness {_shown(shot.staleness_mean)} (max {_whole(shot.staleness_max)}"
        f" of {shot.staleness_bound})"
        f"  tickets {shot.tickets}  unscored {shot.backlog}"
        f"  tokens/s {shot.generated_per_s:,.0f} generated {shot.trained_per_s:,.0f} trained"
        f"  restarts {shot.restarts}" + (f"  busy: {busy}" if busy else "")
    )


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _whole(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def _generated(lease: Lease) -> float:
    return lease.counters.get(GENERATED_COUNTER, 0.0)


def _clipped(share: float) -> float:
    return min(1.0, max(0.0, share))
