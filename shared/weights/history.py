"""The versions of the policy that this process can materialise."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch

from shared.weights.bits import same_bits
from shared.weights.errors import MissingVersion
from shared.wire.weights import Manifest

State = Mapping[str, torch.Tensor]
"""Published tensors by Hugging Face name. Read-only: versions share tensors."""


class WeightHistory:
    """Holds versions in full; tensors that did not change are shared between neighbours.

    Tensors are cloned on `append`, so that a snapshot never follows the live training tensors.
    """

    def __init__(self) -> None:
        self._held: dict[int, tuple[Manifest, State]] = {}

    @property
    def versions(self) -> tuple[int, ...]:
        """Held versions, ascending."""
        return tuple(sorted(self._held))

    @property
    def newest(self) -> int:
        """Newest held version, -1 when nothing is held."""
        return max(self._held, default=-1)

    @property
    def bytes_held(self) -> int:
        """Memory of all tensors, shared ones once."""
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for _, state in self._held.values()
            for tensor in state.values()
        }
        return sum(storages.values())

    def append(self, manifest: Manifest, state: State, *, owned: bool = False) -> None:
        """Hold `state` as `manifest.version`; any order of versions, idempotent.

        Args:
            manifest: its description. The caller has checked the digests.
            state: its tensors.
            owned: nobody else will write to these tensors, so they are kept without a copy.

        Raises:
            ValueError: the version is held with other bytes, or the names disagree.
        """
        version = manifest.version
        if version in self._held:
            held = self._held[version][0].digest
            if held != manifest.digest:
                raise ValueError(
                    f"version {version} is held with digest {held}, offered is {manifest.digest}"
                )
            return
        named = {spec.name for spec in manifest.tensors}
        if named != set(state):
            odd = sorted(named ^ set(state))[0]
            raise ValueError(f"version {version}: tensor {odd!r} is on one side only")
        below = [v for v in self._held if v < version]
        neighbour = self._held[max(below)] if below else None
        self._held[version] = (manifest, _kept(manifest, state, neighbour, owned=owned))

    def materialise(self, version: int) -> State:
        """Return the tensors of a version, read-only.

        Raises:
            MissingVersion: it is not held. Never another version instead.
        """
        return self._entry(version)[1]

    def manifest(self, version: int) -> Manifest:
        """Return the manifest of a held version.

        Raises:
            MissingVersion: it is not held.
        """
        return self._entry(version)[0]

    def evict_below(self, version: int) -> tuple[int, ...]:
        """Drop versions older than `version`, never the newest; return what was dropped.

        `version` is the low-water mark `oldest_needed`: whatever is still referenced stays.
        """
        dropped = tuple(v for v in self.versions if v < version and v != self.newest)
        for old in dropped:
            del self._held[old]
        return dropped

    def discard(self, version: int) -> None:
        """Drop one version whose bytes are doubted, so that the next fetch does not reuse it."""
        self._held.pop(version, None)

    def _entry(self, version: int) -> tuple[Manifest, State]:
        try:
            return self._held[version]
        except KeyError:
            raise MissingVersion(version, self._held) from None


def _kept(
    manifest: Manifest, state: State, neighbour: tuple[Manifest, State] | None, *, owned: bool
) -> State:
    """Return what to keep of `state`: the neighbour's tensor where the bits are the same."""
    older_digests = {s.name: s.digest for s in neighbour[0].tensors} if neighbour else {}
    older = neighbour[1] if neighbour else {}
    kept: dict[str, torch.Tensor] = {}
    for spec in manifest.tensors:
        tensor = state[spec.name]
        same = older_digests.get(spec.name) == spec.digest
        if same and (older[spec.name] is tensor or same_bits(older[spec.name], tensor)):
            kept[spec.name] = older[spec.name]
        else:
            kept[spec.name] = tensor if owned else tensor.detach().clone()
    return MappingProxyType(kept)
