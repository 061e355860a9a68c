"""What one episode leaves behind: trajectory > sequence > turn > token.

T is the number of tokens of a sequence, prompt and environment tokens included.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from shared.wire.base import Array, Part


class SamplingParams(Part):
    """How tokens are drawn; the same function must be applied on the training side."""

    temperature: float = Field(default=1.0, gt=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    """0 = off. Truncated sampling is refused unless the keep-set is recorded."""
    max_new_tokens: int = Field(default=16, gt=0)
    """Per turn."""
    stop_ids: tuple[int, ...] = ()


class Span(Part):
    """Tokens [start, stop) sampled by one policy version, stamped by the engine."""

    version: int = Field(ge=0)
    start: int = Field(ge=0)
    stop: int = Field(gt=0)


class RoutingRecord(Part):
    """Which experts a mixture of experts chose for tokens [start, stop) under one version.

    Recorded by the engine in the forward that sampled; replayed under `model.routing: replay`.
    """

    version: int = Field(ge=0)
    start: int = Field(ge=0)
    stop: int = Field(gt=0)
    experts: Array
    """u1 or u2 [stop - start, L, K]: expert ids, by layer that has any (ascending) and choice."""

    @model_validator(mode="after")
    def _shape_matches(self) -> Self:
        shape = self.experts.shape
        if self.experts.dtype not in ("u1", "u2") or len(shape) != 3 or 0 in shape:
            raise ValueError("routing must be u1 or u2 [tokens, layers, choices], none of them 0")
        if shape[0] != self.stop - self.start:
            raise ValueError(f"routing of {shape[0]} tokens for [{self.start}, {self.stop})")
        return self


def check_routing(records: tuple[RoutingRecord, ...], num_tokens: int | None) -> None:
    """Refuse records that cannot be of one model, or end beyond `num_tokens`.

    Raises:
        ValueError: names what is wrong.
    """
    shapes = {record.experts.shape[1:] for record in records}
    if len(shapes) > 1:
        raise ValueError(f"routing records of several shapes: {sorted(shapes)}")
    for record in records:
        if num_tokens is not None and record.stop > num_tokens:
            raise ValueError(f"routing up to token {record.stop} of {num_tokens}")


def recorded_stop(records: Iterable[RoutingRecord], version: int) -> int:
    """Return up to which token a version is recorded without a gap from the first."""
    stop = 0
    for record in sorted((r for r in records if r.version == version), key=lambda r: r.start):
        if record.start <= stop:
            stop = max(stop, record.stop)
    return stop


class Turn(Part):
    """One answer of the policy inside a sequence."""

    start: int = Field(ge=0)
    """Position of the first sampled token in the sequence."""
    stop: int = Field(ge=0)
    finish: Literal["stop", "length"]
    rewards: dict[str, float] = {}
    """Per-turn rewards by name."""
    sampling: SamplingParams | None = None
    """None: the ticket's."""
    pods: tuple[str, ...] = ()
    """Rollouts that sampled it, in order; more than one after an interruption."""


class Sequence(Part):
    """Token ids whose history only grows; a rewritten history starts a further sequence."""

    token_ids: Array
    """i4[T]."""
    loss_mask: Array
    """u1[T]: 1 exactly where the policy sampled the token."""
    spans: tuple[Span, ...]
    """Version stamps, ascending; they cover exactly the loss tokens."""
    arrays: dict[str, Array] = {}
    """Per-token arrays by name, each of length T, 0 and never read where loss_mask is 0.
    `sampler_logprobs` f4[T] is required. Reserved: old, reference and teacher log-probs, values,
    keep-sets."""
    turns: tuple[Turn, ...] = ()
    mixed_kv: tuple[Span, ...] = ()
    """Tokens sampled over a KV cache of older weights: never exact (see docs/staleness.md)."""
    routing: tuple[RoutingRecord, ...] = ()
    """In the order of sampling; where a token was recorded twice, the first record counts."""
    parent: int | None = None
    """Index of the sequence this one continues, for rewritten histories."""
    agent_id: str = "main"

    @model_validator(mode="after")
    def _stamps_cover_mask(self) -> Self:
        if self.token_ids.dtype != "i4" or len(self.token_ids.shape) != 1:
            raise ValueError("token_ids must be i4[T]")
        length = self.token_ids.shape[0]
        if self.loss_mask.dtype != "u1" or self.loss_mask.shape != (length,):
            raise ValueError("loss_mask must be u1[T]")
        for name, array in self.arrays.items():
            if array.shape[:1] != (length,):
                raise ValueError(f"array {name!r} is not of length T")
        if "sampler_logprobs" not in self.arrays:
            raise ValueError("sampler_logprobs are missing")
        stamped = np.zeros(length, dtype=np.uint8)
        end = 0
        for span in self.spans:
            if not end <= span.start < span.stop <= length:
                raise ValueError(f"span {span.start}:{span.stop} overlaps or is out of range")
            stamped[span.start : span.stop] = 1
            end = span.stop
        if not np.array_equal(stamped, self.loss_mask.numpy()):
            raise ValueError("version spans do not cover exactly the sampled tokens")
        check_routing(self.routing, length)
        return self


class Trajectory(Part):
    """A played episode, ready to be scored and trained."""

    kind: Literal["trajectory"] = "trajectory"
    status: Literal["done", "truncated"]
    """truncated: the turn or length limit ended it, with a real reward."""
    reward: float
    rewards: dict[str, float] = {}
    """Parts of the reward by name."""
    sequences: tuple[Sequence, ...] = Field(min_length=1)
    task_digest: str
    """Digest of the task's *content*, so that a held-out split can be checked by content."""
    played_s: float = 0.0
    metrics: dict[str, float] = {}


FailureReason = Literal[
    "env_error", "env_timeout", "env_lost", "sample_refused", "sample_timeout", "deadline",
    "max_deliver", "undecodable", "too_long",
]  # fmt: skip


class Failure(Part):
    """An episode that ended without a reward. Never a zero reward."""

    kind: Literal["failure"] = "failure"
    reason: FailureReason
    detail: str = ""


Outcome = Annotated[Trajectory | Failure, Field(discriminator="kind")]
