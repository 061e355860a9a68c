"""Manifests and canaries for weights that no model scores, for `make bench-weights`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from shared.weights.digests import version_digest
from shared.wire.base import Array
from shared.wire.weights import Canary, Manifest, TensorSpec


def empty_canary() -> Canary:
    """Return a canary without sequences."""
    return Canary(
        token_ids=Array.of(np.zeros((0, 2)), "i4"),
        logprobs=Array.of(np.zeros((0, 1)), "f4"),
        tolerance=0.0,
    )


def manifest_of(version: int, tensors: Sequence[TensorSpec]) -> Manifest:
    """Return the manifest of a version that is on no bus."""
    return Manifest(
        version=version,
        parent=version - 1 if version else None,
        upload_id=f"bench-{version}",
        delta=None,
        keyframe=None,
        tensors=tuple(tensors),
        digest=version_digest(tensors),
        sha256=None,
        canary=empty_canary(),
        published_at=0.0,
        producer="bench",
    )
