"""What services say about themselves: leases, step reports, dead letters, blob pointers."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from shared.wire.base import Array, Message

Role = Literal["learner", "rollout", "env_agents", "logit_oracle"]


class Lease(Message):
    """Every service -> learner, supervisor, status: alive, with a summary.

    Core publish every `lease_interval_s` and whenever the version changes; none for
    `lease_expiry_s` means down. Latest by (role, pod) wins.
    """

    subject: ClassVar[str] = "lease.<role>.<pod>"

    role: Role
    pod: str
    incarnation: str
    pid: int
    sent_at: float
    ready: bool
    reason: str = ""
    """Why it is not ready."""
    version: int = -1
    """Policy version held; -1: none, or not applicable."""
    counters: dict[str, float] = {}
    """Monotonic since the process started: tokens, episodes, ..."""
    gauges: dict[str, float] = {}
    """Queue depths and the like."""
    busy_s: float = 0.0
    """Seconds of own work since the process started, self-measured."""


class StepReport(Message):
    """Learner -> recorder, supervisor: one optimisation round, on the `stats` log."""

    subject: ClassVar[str] = "stats.step"

    version: int
    """Version published by the step."""
    started_at: float
    trained_at: float
    published_at: float
    scalars: dict[str, float]
    arrays: dict[str, Array] = {}
    """Histograms, per-age sums, (log D, log S, age) samples."""


class DeadLetter(Message):
    """Any service -> operator: a payload that could not be read, kept with the reason."""

    subject: ClassVar[str] = "dead.<service>"

    service: str
    origin: str
    """Subject it came from."""
    origin_seq: int = 0
    reason: str
    payload: bytes
    """At most the first 64 KiB."""
    num_bytes: int
    dropped_at: float


class BlobRef(Message):
    """Any producer -> its consumer: stands in for a payload above half of max_payload.

    The chunks are stored first, named by digest (idempotent); this pointer is appended last.
    """

    subject: ClassVar[str] = "(in place of the message)"

    digest: str
    num_bytes: int = Field(gt=0)
    num_chunks: int = Field(gt=0)
