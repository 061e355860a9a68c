"""From artefact bytes to a version, every digest checked before anyone sees it."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from shared.weights import deltas, keyframes
from shared.weights.digests import sha256_of, specs, version_digest
from shared.weights.errors import Corrupt
from shared.wire.weights import Artefact, Manifest


def from_keyframe(
    manifest: Manifest, artefact: Artefact, data: bytes
) -> Mapping[str, torch.Tensor]:
    """Return the state of a keyframe.

    Raises:
        Corrupt: it is not the version that the manifest describes.
    """
    _check_encoding(artefact, keyframes.ENCODING)
    state = keyframes.decode(data)
    try:
        found = version_digest(specs(state))
    except ValueError as error:
        raise Corrupt("keyframe", "published dtypes", str(error)) from error
    _check(manifest, found, state)
    return state


def from_delta(
    manifest: Manifest,
    artefact: Artefact,
    data: bytes,
    base_manifest: Manifest,
    base: Mapping[str, torch.Tensor],
) -> Mapping[str, torch.Tensor]:
    """Return the state after a delta; `base` is not touched, unchanged tensors are shared.

    Raises:
        WrongBase: the delta was made for another state than `base_manifest` describes.
        Corrupt: the result is not the version that the manifest describes.
    """
    _check_encoding(artefact, deltas.CODEC)
    applied = deltas.apply(base, data, tensors=base_manifest.tensors)
    _check(manifest, applied.digest, applied.state)
    return applied.state


def changed_names(old: Manifest | None, new: Manifest) -> frozenset[str] | None:
    """Return the tensors that differ between two versions, None when all must be assumed to."""
    if old is None:
        return None
    before = {t.name: t for t in old.tensors}
    if set(before) != {t.name for t in new.tensors}:
        return None
    return frozenset(t.name for t in new.tensors if before[t.name] != t)


def _check(manifest: Manifest, found: str, state: Mapping[str, torch.Tensor]) -> None:
    what = f"version {manifest.version}"
    if found != manifest.digest or version_digest(manifest.tensors) != manifest.digest:
        raise Corrupt(what, f"digest {manifest.digest}", f"digest {found}")
    if manifest.sha256 is not None:
        sha256 = sha256_of(state)
        if sha256 != manifest.sha256:
            raise Corrupt(what, f"sha256 {manifest.sha256}", f"sha256 {sha256}")


def _check_encoding(artefact: Artefact, ours: str) -> None:
    if artefact.encoding != ours:
        raise Corrupt(
            f"{artefact.kind} {artefact.upload_id}", f"encoding {ours}", artefact.encoding
        )
