"""Configuration of the env agents."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from shared.runtime.sections import CommonConfig, Section


class IsolationSection(Section):
    """Where environments live, and what each may use (docs/environments.md)."""

    mode: Literal["none", "process"] = "none"
    """`none`: in the service, for environments that are trusted and cheap. `process`: every
    episode in a process forked for it; what hangs, leaks, forks or dies costs that episode."""
    memory_mb: int = Field(default=512, gt=0)
    """Address space of a process beyond what importing the environment took."""
    processes: int = Field(default=8, ge=0)
    """Processes that an episode may start, descendants included."""
    cpu_s: float = Field(default=0.0, ge=0)
    """CPU time of a process; 0: unbounded (`env_timeout_s` bounds every call anyway)."""
    max_message_bytes: int = Field(default=16 << 20, gt=0)
    """One observation or answer."""
    start_timeout_s: float = Field(default=60.0, gt=0)
    """For importing the environment, and for forking a process."""


class EnvAgentsSection(Section):
    """One env agent process: how many episodes it plays, and how long it waits for whom."""

    concurrency: int = Field(default=64, gt=0)
    """Episodes played at once; tickets are never pulled beyond free places."""
    env_timeout_s: float = Field(default=30.0, gt=0)
    """One call of the environment (reset, step, close); longer is a failed episode."""
    isolation: IsolationSection = IsolationSection()
    max_attempts: int = Field(default=5, gt=0)
    """Deliveries of one ticket; after so many the ticket ends as failed."""
    heartbeat_s: float = Field(default=1.0, gt=0)
    """How often a rollout says that it is still at a request."""
    heartbeat_misses: int = Field(default=3, gt=0)
    """Heartbeats missed in a row before a request is sent again to somebody else."""
    backoff_s: float = Field(default=0.05, gt=0)
    """First wait before asking again when no rollout can serve now; doubles, with jitter."""
    backoff_max_s: float = Field(default=1.0, gt=0)
    ack_wait_s: float = Field(default=10.0, gt=0)
    """A ticket whose player says nothing for so long is delivered to another."""
    max_ack_pending: int = Field(default=16384, gt=0)
    """Tickets in play over all env agents; at least the admission bound."""
    pull_timeout_s: float = Field(default=1.0, gt=0)
    """One wait for tickets; also the longest delay before a stop is seen."""
    pull_linger_s: float = Field(default=0.01, ge=0)
    """Pause between pulls, so that places that become free together share one request."""
    streams_timeout_s: float = Field(default=60.0, gt=0)
    """How long to wait at start until the learner has created the streams."""
    drain_s: float = Field(default=5.0, gt=0)
    """At a stop: for storing what is finished and handing back the rest."""


class EnvAgentsConfig(CommonConfig):
    """What an env agent reads."""

    env_agents: EnvAgentsSection = EnvAgentsSection()
