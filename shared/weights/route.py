"""How to get from what is held to a version: which keyframes and deltas, in which order. Pure."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass

from shared.wire.weights import Artefact, Manifest


@dataclass(frozen=True, slots=True)
class Step:
    """Materialise `manifest.version` from one artefact."""

    manifest: Manifest
    artefact: Artefact
    base: int | None
    """Version the delta applies to; None: a keyframe, needs nothing."""


def route(
    manifests: Mapping[int, Manifest],
    held: Container[int],
    target: int,
    broken: Container[str] = (),
) -> list[Step] | None:
    """Return the steps with the fewest bytes to `target`, or None when there is no way.

    Args:
        manifests: known ones by version.
        held: versions that a delta may start from.
        target: the version wanted; held already gives no steps.
        broken: upload ids not to be used.
    """
    chain: list[Step] = []
    chain_bytes = 0
    best: list[Step] | None = None
    best_bytes = float("inf")
    version = target
    while version not in held:
        manifest = manifests.get(version)
        if manifest is None:
            return best
        keyframe, delta, parent = manifest.keyframe, manifest.delta, manifest.parent
        if keyframe is not None and keyframe.upload_id not in broken:
            total = chain_bytes + keyframe.num_bytes
            if total < best_bytes:
                best, best_bytes = [Step(manifest, keyframe, None), *reversed(chain)], total
        if delta is None or parent is None or parent >= version or delta.upload_id in broken:
            return best
        chain.append(Step(manifest, delta, parent))
        chain_bytes += delta.num_bytes
        if chain_bytes > best_bytes:
            return best
        version = parent
    return [*reversed(chain)]
