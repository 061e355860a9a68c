"""Manifests of published policy versions, and the control document."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

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
    """Bytes on the chunk stream, under a random upload id."""

    kind: Literal["keyframe", "delta"]
    upload_id: str
    num_chunks: int = Field(gt=0)
    num_bytes: int = Field(ge=0)
    digest: str
    """xxh3-128 of the whole."""
    encoding: str = "safetensors"
    """keyframe: `safetensors`. delta: name of the delta codec."""


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

    subject: ClassVar[str] = "manifest"

    version: int = Field(ge=0)
    parent: int | None
    """Version the delta applies to; None for the first."""
    epoch: int = 0
    """Fork count: + 1 when a restored learner could not re-derive a committed version."""
    model_id: str = "policy"
    upload_id: str
    delta: Artefact | None
    keyframe: Artefact | None
    """Present every N versions and at version 0."""
    tensors: tuple[TensorSpec, ...]
    digest: str
    """Of the version: over all tensors' names, dtypes, shapes and digests."""
    sha256: str | None
    """Full hash over the canonical bytes (name, dtype, shape, data in name order)."""
    canary: Canary
    optimizer_steps: int = 0
    published_at: float
    producer: str


class Control(Message):
    """Learner -> everyone: the run's polled control document (latest value wins)."""

    subject: ClassVar[str] = "(bucket control, key control)"

    phase: Literal["running", "draining", "done"]
    head_version: int
    oldest_needed: int
    """Low-water mark: no untrained token or retained checkpoint references an older version."""
    generation: int = 0
    """Fence of the interrupt route: env_agents acknowledge each new value."""
    updated_at: float
