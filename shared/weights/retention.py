"""Which versions must stay. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from shared.wire.weights import Manifest


def oldest_needed(
    head: int,
    *,
    token_versions: Iterable[int] = (),
    issue_versions: Iterable[int] = (),
    checkpoint_versions: Iterable[int] = (),
) -> int:
    """Return the low-water mark: the oldest version that anything may still ask for.

    Args:
        head: newest published version.
        token_versions: stamps of tokens that are sampled but not trained, dropped or failed.
        issue_versions: versions at which outstanding tickets were issued; their tokens will carry
            this version or a newer one (`min_version`).
        checkpoint_versions: versions of retained checkpoints: a restored learner goes back there
            and trains again on tokens as old as the checkpoint's own low-water mark, so pass that
            mark, too.
    """
    return min([head, *token_versions, *issue_versions, *checkpoint_versions])


@dataclass(frozen=True, slots=True)
class KeyframePlace:
    """Where a keyframe lies."""

    version: int
    manifest_seq: int
    upload_id: str
    """Of its chunks."""


def oldest_kept(keyframes: Iterable[KeyframePlace], needed: int) -> KeyframePlace | None:
    """Return the newest keyframe at or below `needed`: it and everything after it stays."""
    bases = [k for k in keyframes if k.version <= needed]
    return max(bases, key=lambda k: k.version, default=None)


def upload_ids(manifest: Manifest) -> frozenset[str]:
    """Return the upload ids whose chunks a manifest needs."""
    return frozenset(a.upload_id for a in (manifest.delta, manifest.keyframe) if a is not None)
