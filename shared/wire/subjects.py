"""Names of subjects, streams and buckets of one run. Several runs share one NATS."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

StreamName = Literal[
    "tickets", "terminals", "scores", "partials", "journal", "manifests", "chunks", "blobs",
    "stats", "dead",
]  # fmt: skip

_RUN = re.compile(r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?")
_TOKEN = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True)
class StreamSpec:
    """What a stream is for and how it is kept."""

    name: StreamName
    subject: str
    """Filter below the run's prefix."""
    retention: Literal["limits", "workqueue"]
    why: str


STREAMS: tuple[StreamSpec, ...] = (
    StreamSpec("tickets", "ticket.*", "workqueue", "episodes nobody has finished yet"),
    StreamSpec("terminals", "terminal.*", "limits", "one outcome per ticket"),
    StreamSpec("scores", "score.*", "limits", "old log-probs per terminal"),
    StreamSpec("partials", "partial.*.*", "limits", "episodes in progress at a fence; scores"),
    StreamSpec("journal", "journal", "limits", "the learner's decisions, single writer"),
    StreamSpec("manifests", "manifest.*", "limits", "published versions; the append is the fence"),
    StreamSpec("chunks", "chunk.*.*", "limits", "bytes of keyframes and deltas"),
    StreamSpec("blobs", "blob.*.*", "limits", "bytes of payloads too large for one message"),
    StreamSpec("stats", "stats.*", "limits", "step reports"),
    StreamSpec("dead", "dead.*", "limits", "payloads that could not be read, with the reason"),
)


@dataclass(frozen=True)
class Subjects:
    """All names of one run.

    Raises:
        ValueError: the run name is not lower-case letters, digits and inner dashes (<= 40).
    """

    run: str

    def __post_init__(self) -> None:
        if not _RUN.fullmatch(self.run):
            raise ValueError(
                f"run name {self.run!r}: use lower-case letters, digits and inner dashes, <= 40"
            )

    @property
    def prefix(self) -> str:
        return f"lagwise.{self.run}"

    def stream(self, name: StreamName) -> str:
        """JetStream name of a stream."""
        return f"lagwise-{self.run}-{name}"

    @property
    def control_bucket(self) -> str:
        return f"lagwise-{self.run}-control"

    def ticket(self, ticket_id: str) -> str:
        return f"{self.prefix}.ticket.{_token(ticket_id)}"

    def terminal(self, ticket_id: str) -> str:
        return f"{self.prefix}.terminal.{_token(ticket_id)}"

    def score(self, ticket_id: str) -> str:
        return f"{self.prefix}.score.{_token(ticket_id)}"

    def partial(self, ticket_id: str) -> str:
        return f"{self.prefix}.partial.tokens.{_token(ticket_id)}"

    def partial_scores(self, version: int) -> str:
        return f"{self.prefix}.partial.scores.{version}"

    @property
    def journal(self) -> str:
        return f"{self.prefix}.journal"

    @property
    def manifest(self) -> str:
        return f"{self.prefix}.manifest.version"

    @property
    def keyframe(self) -> str:
        return f"{self.prefix}.manifest.keyframe"

    def chunk(self, upload_id: str, index: int) -> str:
        return f"{self.prefix}.chunk.{_token(upload_id)}.{index}"

    def blob(self, digest: str, index: int) -> str:
        return f"{self.prefix}.blob.{_token(digest)}.{index}"

    def stats(self, name: str) -> str:
        return f"{self.prefix}.stats.{_token(name)}"

    def dead(self, service: str) -> str:
        return f"{self.prefix}.dead.{_token(service)}"

    def sample(self, model_id: str) -> str:
        return f"{self.prefix}.sample.{_token(model_id)}"

    def sample_pod(self, pod: str) -> str:
        return f"{self.prefix}.sample.pod.{_token(pod)}"

    def cancel(self, pod: str) -> str:
        return f"{self.prefix}.cancel.{_token(pod)}"

    @property
    def control(self) -> str:
        """Core copy of the control document, so that nobody has to wait for the next poll."""
        return f"{self.prefix}.control"

    def lease(self, role: str, pod: str) -> str:
        return f"{self.prefix}.lease.{_token(role)}.{_token(pod)}"

    @property
    def leases(self) -> str:
        """Wildcard over all leases."""
        return f"{self.prefix}.lease.*.*"


def _token(value: str) -> str:
    if not _TOKEN.fullmatch(value):
        raise ValueError(f"{value!r} cannot be part of a subject: use letters, digits, _ and -")
    return value
