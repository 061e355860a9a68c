"""The bytes of a version, stored before it has a number."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from shared.weights.artefact_writer import ArtefactWriter
from shared.weights.base_copy import BaseCopy
from shared.weights.deltas import DeltaWriter
from shared.weights.digests import num_bytes, sha256_of
from shared.weights.offload import crunch
from shared.weights.settled import Settled, settled
from shared.wire.weights import Artefact, TensorSpec

SHA256_BYTES = 64 * 1024 * 1024
"""Models up to this size carry a full hash on every version, larger ones on keyframes."""


@dataclass(frozen=True, slots=True)
class StoredVersion:
    """What the manifest of a version will say."""

    tensors: tuple[TensorSpec, ...]
    delta: Artefact | None
    keyframe: Artefact | None
    sha256: str | None
    base: BaseCopy
    """The copy of the version before; made new where there was none."""

    @property
    def num_bytes(self) -> int:
        """Uploaded."""
        return sum(a.num_bytes for a in (self.delta, self.keyframe) if a is not None)

    async def move_base(self, live: Mapping[str, torch.Tensor]) -> Settled[None]:
        """Bring the base copy up to this version, even if cancelled meanwhile."""
        return await settled(self.base.num_bytes, lambda: self.base.follow(live, self.tensors))


async def store_version(
    artefacts: ArtefactWriter,
    upload_id: str,
    live: Mapping[str, torch.Tensor],
    base: BaseCopy | None,
    *,
    threads: int,
) -> StoredVersion:
    """Store `live`: a delta where there is a base, else all of it.

    Raises:
        WrongBase: names, shapes or dtypes are not those of the base.
        BusError: the bus or the store refused or did not answer.
    """
    size = num_bytes(live)
    if base is None:
        made = await crunch(size, lambda: BaseCopy(live))
        sha256 = await crunch(size, lambda: sha256_of(made.state))
        keyframe = await artefacts.keyframe(f"{upload_id}-k", made.state)
        return StoredVersion(made.tensors, None, keyframe, sha256, made)
    writer = DeltaWriter(base.state, live, tensors=base.tensors, threads=threads)
    delta = await artefacts.delta(f"{upload_id}-d", writer, size)
    hashed = await crunch(size, lambda: sha256_of(live)) if size <= SHA256_BYTES else None
    return StoredVersion(writer.tensors, delta, None, hashed, base)
