"""The head as its publisher holds it: what the next delta is made against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from shared.runtime.errors import Fatal
from shared.weights.digests import num_bytes, sha256_of, specs, version_digest
from shared.wire.weights import Manifest, TensorSpec


class BaseCopy:
    """One full copy in memory of its own, contiguous, on the CPU."""

    def __init__(self, state: Mapping[str, torch.Tensor], *, owned: bool = False) -> None:
        """Copy `state` and compute its digests.

        Args:
            state: a version.
            owned: nobody else writes to these tensors: those that can serve are not copied.
                Tensors that share memory are taken apart.

        Raises:
            ValueError: a dtype that is never published.
        """
        taken: set[int] = set()
        self._state = {name: _own(t, taken if owned else None) for name, t in state.items()}
        self.tensors = specs(self._state)
        """Digests as of the last change; `check` compares them with the bytes."""
        self.num_bytes = num_bytes(self._state)

    @property
    def state(self) -> Mapping[str, torch.Tensor]:
        """The tensors; not to be written to."""
        return self._state

    @property
    def digest(self) -> str:
        """Of the version, from the specs."""
        return version_digest(self.tensors)

    def follow(self, live: Mapping[str, torch.Tensor], tensors: Sequence[TensorSpec]) -> None:
        """Copy what changed; `tensors` describe `live`."""
        before = {spec.name: spec.digest for spec in self.tensors}
        for spec in tensors:
            if before[spec.name] != spec.digest:
                self._state[spec.name].copy_(live[spec.name].detach())
        self.tensors = tuple(tensors)

    def check(self, manifest: Manifest) -> str:
        """Read every element and compare with the manifest; return the SHA-256.

        Raises:
            Fatal: this is not the version that was published: memory failed, or the live weights
                changed while they were published.
        """
        found = version_digest(specs(self._state))
        sha256 = sha256_of(self._state)
        if found != manifest.digest or manifest.sha256 not in (None, sha256):
            raise Fatal(
                f"version {manifest.version}: the publisher's copy has digest {found}, sha256 "
                f"{sha256}; published were digest {manifest.digest}, sha256 {manifest.sha256}: "
                "failing memory, or weights that changed while they were published; restart"
            )
        return sha256


def _own(tensor: torch.Tensor, taken: set[int] | None) -> torch.Tensor:
    """Return the tensor itself if it may be kept, else a copy; `taken`: storages kept so far."""
    source = tensor.detach()
    if taken is not None and source.device.type == "cpu" and source.is_contiguous():
        storage = source.untyped_storage().data_ptr()
        if storage not in taken:
            taken.add(storage)
            return source
    return source.to(device="cpu", copy=True).contiguous()
