"""What a history holds besides the copy: versions, the links between them, where the copy is."""

from __future__ import annotations

from shared.weights.digests import version_digest
from shared.weights.errors import Corrupt, MissingVersion
from shared.weights.lineage import Dropped, Hop, Lineage
from shared.weights.links import Link
from shared.wire.weights import Manifest


class Holdings:
    """Books, no tensors. All versions are connected: each can be reached from the position."""

    def __init__(self) -> None:
        self.position = -1
        """The version that the copy is at, -1 when nothing is held."""
        self._lineage: Lineage[Link] = Lineage()
        self._manifests: dict[int, Manifest] = {}
        """Of every version of the lineage."""
        self._evicted: set[int] = set()
        """Those that only connect others, or that the copy is at."""

    @property
    def versions(self) -> tuple[int, ...]:
        """Versions that may be asked for, ascending."""
        return tuple(v for v in self._lineage.versions if v not in self._evicted)

    @property
    def digest(self) -> str:
        """What the copy must have at the position; empty when nothing is held."""
        return "" if self.position < 0 else self._manifests[self.position].digest

    @property
    def bytes_in_memory(self) -> int:
        """Memory of all links."""
        return sum(link.spool.bytes_in_memory for link in self._lineage.payloads)

    @property
    def bytes_spilled(self) -> int:
        """Bytes of all links that lie in files."""
        return sum(link.spool.bytes_spilled for link in self._lineage.payloads)

    def manifest(self, version: int) -> Manifest:
        """Return the manifest of a version, an evicted one that is still there included.

        Raises:
            MissingVersion: it is not there.
        """
        try:
            return self._manifests[version]
        except KeyError:
            raise MissingVersion(version, self.versions) from None

    def path(self, version: int) -> list[Hop[Link]]:
        """Return the hops from the position to a version, an evicted one included.

        Raises:
            MissingVersion: it is not there.
        """
        path = self._lineage.path(self.position, version)
        if path is None:
            raise MissingVersion(version, self.versions)
        return path

    def has(self, manifest: Manifest) -> bool:
        """Return whether a version is there; an evicted one may be asked for again then.

        Raises:
            Corrupt: it is there with other bytes, or the manifest contradicts itself.
        """
        version, held = manifest.version, self._manifests.get(manifest.version)
        described = version_digest(manifest.tensors)
        if described != manifest.digest:
            raise Corrupt(f"tensors of manifest {version}", f"digest {manifest.digest}", described)
        if held is None:
            return False
        if held.digest != manifest.digest:
            raise Corrupt(f"version {version}", f"digest {held.digest} as held", manifest.digest)
        self._evicted.discard(version)
        return True

    def owns(self, link: Link) -> bool:
        """Return whether a link is one of these."""
        return link in self._lineage.payloads

    def oldest_in_memory(self) -> Link | None:
        """Return the link that has been here longest and takes memory."""
        return next((x for x in self._lineage.payloads if x.spool.bytes_in_memory), None)

    def arrive(self, manifest: Manifest, link: Link | None, *, reverse: bool = False) -> None:
        """The copy came to a new version, along `link`. None: nothing else can be reached now.

        `reverse`: the link leads from the new version to the position.
        """
        version = manifest.version
        self._lineage.add(version)
        self._manifests[version] = manifest
        if link is not None:
            ends = (version, self.position) if reverse else (self.position, version)
            self._lineage.link(*ends, link)
        self.position = version
        self._forget(self._lineage.keep_tree_of(version))

    def cut(self, hop: Hop[Link]) -> None:
        """The link of a hop from the position is bad: drop it and what it led to."""
        self._lineage.cut(hop.frm, hop.to).close()
        self._forget(self._lineage.keep_tree_of(self.position))

    def evict_below(self, version: int) -> tuple[int, ...]:
        """Hide versions older than `version`, never the newest; return them."""
        hidden = tuple(v for v in self.versions[:-1] if v < version)
        self._evicted.update(hidden)
        return hidden

    def prune(self) -> None:
        """Drop evicted versions that connect no others and are not the position."""
        self._forget(self._lineage.prune({*self.versions, self.position}))

    def clear(self) -> None:
        """Drop everything."""
        self._forget(self._lineage.prune(()))
        self.position = -1

    def _forget(self, dropped: Dropped[Link]) -> None:
        for link in dropped.payloads:
            link.close()
        for version in dropped.versions:
            del self._manifests[version]
        self._evicted -= dropped.versions
