"""How to get from what is held to a version: which keyframes and deltas, in which order. Pure."""

from __future__ import annotations

import heapq
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count

from shared.wire.weights import Artefact, Keyframe, Manifest


@dataclass(frozen=True, slots=True)
class Step:
    """Materialise `manifest.version` from one artefact."""

    manifest: Manifest
    artefact: Artefact
    base: int | None
    """Version the delta applies to; None: a keyframe, needs nothing."""
    reverse: bool = False
    """The delta is that of `base`, taken back."""


def route(
    manifests: Mapping[int, Manifest],
    held: Container[int],
    target: int,
    broken: Container[str] = (),
    keyframes: Mapping[int, Sequence[Keyframe]] | None = None,
) -> list[Step] | None:
    """Return the steps with the fewest bytes to `target`, or None when there is no way.

    Searched from the target backwards (Dijkstra), so that the common case, one delta from what is
    held, looks at one manifest. A delta leads both ways: a version whose own delta is lost is
    reached from its successor.

    Args:
        manifests: known ones by version.
        held: versions that a delta may start from.
        target: the version wanted; held already gives no steps.
        broken: upload ids not to be used.
        keyframes: records by version; those whose digest is not the manifest's are ignored.
    """
    order = count()
    chain: dict[int, tuple[Step, int] | None] = {}
    """Per version seen: the step that leaves it and where that leads; None at the target."""
    frontier: list[tuple[int, int, int, Step | None, tuple[Step, int] | None]] = []
    heapq.heappush(frontier, (0, next(order), target, None, None))
    while frontier:
        num_bytes, _, version, keyframe, onward = heapq.heappop(frontier)
        if keyframe is not None:
            return [keyframe, *_from(version, chain)]
        if version in chain:
            continue
        chain[version] = onward
        if version in held:
            return _from(version, chain)
        for step in _into(manifests, version, broken, keyframes or {}):
            total = num_bytes + step.artefact.num_bytes
            if step.base is None:
                heapq.heappush(frontier, (total, next(order), version, step, None))
            elif step.base not in chain:
                heapq.heappush(frontier, (total, next(order), step.base, None, (step, version)))
    return None


def reachable(
    manifests: Mapping[int, Manifest],
    held: Container[int],
    broken: Container[str] = (),
    keyframes: Mapping[int, Sequence[Keyframe]] | None = None,
) -> frozenset[int]:
    """Return all versions that `route` finds a way to, among those with a manifest."""
    onward: dict[int, list[int]] = {}
    ahead: list[int] = []
    for version in manifests:
        steps = list(_into(manifests, version, broken, keyframes or {}))
        if version in held or any(s.base is None or s.base in held for s in steps):
            ahead.append(version)
        for step in steps:
            if step.base is not None:
                onward.setdefault(step.base, []).append(version)
    found: set[int] = set()
    while ahead:
        version = ahead.pop()
        if version not in found:
            found.add(version)
            ahead += onward.get(version, ())
    return frozenset(found)


def _from(version: int, chain: Mapping[int, tuple[Step, int] | None]) -> list[Step]:
    """Return the steps from `version` to the target."""
    steps: list[Step] = []
    onward = chain[version]
    while onward is not None:
        step, version = onward
        steps.append(step)
        onward = chain[version]
    return steps


def _into(
    manifests: Mapping[int, Manifest],
    version: int,
    broken: Container[str],
    keyframes: Mapping[int, Sequence[Keyframe]],
) -> Iterator[Step]:
    """Yield every usable step that ends at `version`, the likeliest to be intact first."""
    manifest = manifests.get(version)
    if manifest is None:
        return
    parent, child = manifest.parent, manifests.get(version + 1)
    forth = manifest.delta
    if parent is not None and parent < version and forth and forth.upload_id not in broken:
        yield Step(manifest, forth, parent)
    back = child.delta if child is not None and child.parent == version else None
    if back is not None and back.upload_id not in broken:
        yield Step(manifest, back, version + 1, reverse=True)
    for record in reversed(keyframes.get(version, ())):
        if record.digest == manifest.digest and record.artefact.upload_id not in broken:
            # The record's hash covers what the manifest of a large model leaves to digests.
            hashed = manifest.model_copy(update={"sha256": record.sha256})
            yield Step(hashed, record.artefact, None)
    if manifest.keyframe is not None and manifest.keyframe.upload_id not in broken:
        yield Step(manifest, manifest.keyframe, None)
