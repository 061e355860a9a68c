"""Manifests of published policy versions, and the control document."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from shared.wire.base import Array, Message, Part


class TensorSpec(Part):
    """One published tensor."""

    name: str
    """Hugging Face name."""
    dtype: str
    """safetensors code: F32, BF16, F16, F64."""
    shape: tuple[int, ...]
    digest: str
    """Additive digest over (index, bits), 16 hex digits."""


class Artefact(Part):
    """Bytes under a random upload id: on the chunk stream, or a file of the keyframe store."""

    kind: Literal["keyframe", "delta"]
    upload_id: str
    num_chunks: int = Field(ge=0)
    """On the chunk stream; 0: a file."""
    num_bytes: int = Field(ge=0)
    digest: str
    """xxh3-128 of the whole."""
    encoding: str = "safetensors"
    """keyframe: `safetensors`. delta: name of the delta codec."""
    location: str = ""
    """Path below the configured keyframe store; empty: on the chunk stream."""

    @model_validator(mode="after")
    def _lies_in_one_place(self) -> Self:
        if (self.num_chunks > 0) == bool(self.location):
            raise ValueError("either chunks or a location")
        return self


class Canary(Part):
    """A fixed batch scored from the published bytes; every follower must reproduce it."""

    token_ids: Array
    """i4[B, L]."""
    logprobs: Array
    """f4 or f8 [B, L-1]: log-prob of token t+1 given tokens <= t."""
    tolerance: float
    """Floor of the published dtype: disagreement beyond it withholds the version."""


class Manifest(Message):
    """Learner -> rollout, logit_oracle, recorder: version v is these bytes.

    Appending it *allocates* the version: expected last subject sequence = the previous manifest's
    (0 for the first). Chunks lie under their upload ids before it. Strictly ordered; a retried
    append reads back and compares upload ids.
    """

    subject: ClassVar[str] = "manifest.version"

    version: int = Field(ge=0)
    parent: int | None
    """Version the delta applies to; None for the first."""
    epoch: int = 0
    """Fork count: + 1 when a restored learner could not re-derive a committed version."""
    model_id: str = "policy"
    upload_id: str
    delta: Artefact | None
    keyframe: Artefact | None
    """At version 0, and wherever the publisher had no base for a delta; others are announced by
    `Keyframe` records."""
    tensors: tuple[TensorSpec, ...]
    digest: str
    """Of the version: over all tensors' names, dtypes, shapes and digests."""
    sha256: str | None
    """Full hash over the canonical bytes (name, dtype, shape, data in name order)."""
    canary: Canary
    optimizer_steps: int = 0
    published_at: float
    producer: str


class Keyframe(Message):
    """Learner -> rollout, logit_oracle, recorder: version v is also available in full.

    On the manifest log, after v's manifest: every N versions, and when a follower's lease asks for
    one (gauge `keyframe_wanted`). Several for one version may exist; any of them will do.
    """

    subject: ClassVar[str] = "manifest.keyframe"

    version: int = Field(ge=0)
    artefact: Artefact
    digest: str
    """Of the version, as in its manifest."""
    sha256: str
    """Full hash over the canonical bytes: what a follower's own copy of v must have, too."""
    published_at: float
    producer: str


class Control(Message):
    """Learner -> everyone: the run's polled control document (latest value wins).

    At a fence also sent as a core message; what counts is the bucket.
    """

    subject: ClassVar[str] = "(bucket control, key control) | control"

    phase: Literal["running", "draining", "done"]
    head_version: int
    oldest_needed: int
    """Low-water mark: no untrained token or retained checkpoint references an older version."""
    generation: int = 0
    """Fence of the interrupt route: env_agents acknowledge each new value, which only grows."""
    min_version: int = 0
    """From this generation on no token may be sampled below it."""
    updated_at: float
