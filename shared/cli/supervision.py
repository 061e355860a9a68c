"""What the supervisor does about its children: events in, actions out; no clock, no processes.

A child that dies is restarted with exponential back-off and counted. Exit code 2 (bad
configuration) or 3 (fenced) is not restarted: the run stops with that child's own words. The run
ends when the learner exits 0. Stopping goes stage by stage, each bounded: learner, env_agents,
rollouts and oracles, recorder, nats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

ChildRole = Literal["nats", "recorder", "learner", "rollout", "env_agents", "logit_oracle"]

STOP_STAGES: tuple[tuple[ChildRole, ...], ...] = (
    ("learner",), ("env_agents",), ("rollout", "logit_oracle"), ("recorder",), ("nats",),
)  # fmt: skip
"""Whoever produces work stops first; the recorder reads to the end; the bus goes last."""

DONE_STAGES: tuple[tuple[ChildRole, ...], ...] = (
    ("env_agents", "rollout", "logit_oracle"), ("recorder",), ("nats",),
)  # fmt: skip
"""When the learner has finished, nobody waits for the services' work any more."""

NOT_RESTARTED = {2: "bad configuration", 3: "fenced"}


@dataclass(frozen=True)
class Child:
    """One process of the run."""

    pod: str
    role: ChildRole


@dataclass(frozen=True)
class Policy:
    """The numbers of restarting and stopping."""

    backoff_min_s: float = 0.2
    backoff_max_s: float = 10.0
    nats_backoff_max_s: float = 2.0
    """Without the bus everybody waits."""
    stable_s: float = 10.0
    """A life so long forgets earlier deaths."""
    give_up_after: int = 8
    """Deaths in a row, each before `stable_s`, after which the run stops."""
    stop_bound_s: float = 8.0
    """Per stage, between SIGTERM and SIGKILL."""
    stop_bounds_s: dict[ChildRole, float] = field(
        default_factory=lambda: {"learner": 20.0, "recorder": 20.0}
    )


# --- events
@dataclass(frozen=True)
class Exited:
    """A child is gone. `code` is negative for a signal."""

    pod: str
    code: int
    at: float
    lived_s: float
    detail: str = ""
    """Its last words."""
    done: bool = True
    """Of a learner with code 0: its run is finished, it was not merely asked to leave."""


@dataclass(frozen=True)
class Tick:
    """Time has passed."""

    at: float


@dataclass(frozen=True)
class StopAsked:
    """Someone asked to stop (Ctrl-C, SIGTERM, the bus did not start); twice means at once."""

    at: float
    reason: str
    code: int = 130


Event = Exited | Tick | StopAsked


# --- actions
@dataclass(frozen=True)
class Start:
    """Start a child; `restart` counts from 1, 0 is the first start."""

    pod: str
    restart: int = 0


@dataclass(frozen=True)
class Signal:
    """Send SIGTERM or SIGKILL."""

    pod: str
    kind: Literal["term", "kill"]


@dataclass(frozen=True)
class RestartPlanned:
    """For the record: the child comes back after `delay_s`."""

    pod: str
    cause: str
    delay_s: float


@dataclass(frozen=True)
class Finished:
    """All children are gone."""

    code: int
    """0: the learner finished its run; 2, 3: a child's refusal; 1: a child that keeps dying;
    130: interrupted."""
    reason: str


Action = Start | Signal | RestartPlanned | Finished


@dataclass
class _State:
    child: Child
    running: bool = False
    start_at: float | None = None
    deaths_in_row: int = 0
    restarts: int = 0


class Supervision:
    """The decisions of one run."""

    def __init__(self, children: Sequence[Child], policy: Policy | None = None) -> None:
        self._policy = policy or Policy()
        self._states = {child.pod: _State(child) for child in children}
        self._stages = STOP_STAGES
        self._stage: int | None = None
        self._stage_deadline: float | None = None
        self._outcome = Finished(1, "unknown")
        self._finished = False

    @property
    def stopping(self) -> bool:
        return self._stage is not None

    @property
    def restarts(self) -> dict[str, int]:
        """Restarts by role, zeros included."""
        counts: dict[str, int] = {}
        for state in self._states.values():
            role = state.child.role
            counts[role] = counts.get(role, 0) + state.restarts
        return counts

    def begin(self) -> list[Action]:
        """Start everything, in the order given."""
        for state in self._states.values():
            state.running = True
        return [Start(pod) for pod in self._states]

    def wake_at(self) -> float | None:
        """Return when the next `Tick` is due, None when only events matter."""
        times = [s.start_at for s in self._states.values() if s.start_at is not None]
        if self._stage_deadline is not None:
            times.append(self._stage_deadline)
        return min(times, default=None)

    def handle(self, event: Event) -> list[Action]:
        """Return what to do now, in order."""
        if self._finished:
            return []
        match event:
            case Exited():
                return self._on_exit(event)
            case Tick(at):
                return self._on_tick(at)
            case StopAsked(at, reason, code):
                if self.stopping:
                    return self._kill_everything()
                return self._stop(at, Finished(code, reason))

    def _on_exit(self, event: Exited) -> list[Action]:
        state = self._states[event.pod]
        state.running = False
        if self.stopping:
            if self._reached(state.child.role):
                return self._advance(event.at)
            needed = state.child.role in ("nats", "recorder")
            return [self._plan_restart(state, event)] if needed else []
        if state.child.role == "learner" and event.code == 0 and event.done:
            self._stages = DONE_STAGES
            return self._stop(event.at, Finished(0, "done"))
        if event.code in NOT_RESTARTED:
            why = event.detail or NOT_RESTARTED[event.code]
            return self._stop(event.at, Finished(event.code, f"{event.pod}: {why}"))
        planned = self._plan_restart(state, event)
        if state.deaths_in_row > self._policy.give_up_after:
            reason = f"{event.pod} died {state.deaths_in_row} times in a row: {planned.cause}"
            return self._stop(event.at, Finished(1, reason))
        return [planned]

    def _on_tick(self, at: float) -> list[Action]:
        actions: list[Action] = []
        for state in self._states.values():
            if state.start_at is not None and state.start_at <= at:
                state.start_at = None
                state.running = True
                state.restarts += 1
                actions.append(Start(state.child.pod, state.restarts))
        if self._stage_deadline is not None and self._stage_deadline <= at:
            self._stage_deadline = None
            actions += [Signal(pod, "kill") for pod in self._running_in_stage()]
        return actions

    def _plan_restart(self, state: _State, event: Exited) -> RestartPlanned:
        policy = self._policy
        stable = event.lived_s >= policy.stable_s
        state.deaths_in_row = 1 if stable else state.deaths_in_row + 1
        doublings = min(state.deaths_in_row - 1, 30)
        is_nats = state.child.role == "nats"
        bound_s = policy.nats_backoff_max_s if is_nats else policy.backoff_max_s
        delay_s = min(bound_s, policy.backoff_min_s * 2.0**doublings)
        state.start_at = event.at + delay_s
        return RestartPlanned(event.pod, describe_exit(event.code, event.detail), delay_s)

    def _stop(self, at: float, outcome: Finished) -> list[Action]:
        self._outcome = outcome
        self._stage = -1
        return self._advance(at)

    def _advance(self, at: float) -> list[Action]:
        assert self._stage is not None
        actions: list[Action] = []
        while not self._running_in_stage():
            if self._stage + 1 == len(self._stages):
                return [*actions, self._finish()]
            self._stage += 1
            for state in self._in_stage():
                state.start_at = None
            running = self._running_in_stage()
            actions += [Signal(pod, "term") for pod in running]
            bounds = [
                self._policy.stop_bounds_s.get(role, self._policy.stop_bound_s)
                for role in self._stages[self._stage]
            ]
            self._stage_deadline = at + max(bounds) if running else None
        return actions

    def _kill_everything(self) -> list[Action]:
        self._stages, self._stage = STOP_STAGES, len(STOP_STAGES) - 1
        self._stage_deadline = None
        self._outcome = Finished(130, "interrupted twice: killed")
        for state in self._states.values():
            state.start_at = None
        running = [s.child.pod for s in self._states.values() if s.running]
        return [Signal(pod, "kill") for pod in running] or [self._finish()]

    def _finish(self) -> Finished:
        self._finished = True
        self._stage_deadline = None
        return self._outcome

    def _reached(self, role: ChildRole) -> bool:
        assert self._stage is not None
        return any(role in roles for roles in self._stages[: self._stage + 1])

    def _in_stage(self) -> list[_State]:
        """Children of the current stage and of those before it."""
        return [s for s in self._states.values() if self._reached(s.child.role)]

    def _running_in_stage(self) -> list[str]:
        return [s.child.pod for s in self._in_stage() if s.running]


def describe_exit(code: int, detail: str) -> str:
    """Return one phrase for how a process ended."""
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    return f"{how}: {detail}" if detail else how
