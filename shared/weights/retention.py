"""Which versions must stay, and which bytes they need. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from shared.weights.manifest_log import RetainedLog
from shared.wire.weights import Artefact, Keyframe, Manifest


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
    upload_id: str
    num_chunks: int
    """On the chunk stream; 0: a file of the keyframe store."""


class PublishedLog:
    """What the manifest log holds, as far as retention is concerned."""

    def __init__(self, retained: RetainedLog | None = None) -> None:
        """Take in what the log holds now; nothing yet when it is not given."""
        self.seqs: dict[int, int] = {}
        """version -> sequence of its manifest."""
        self.deltas: dict[int, str] = {}
        """version -> upload id of the delta that leads to it."""
        self.keyframes: list[KeyframePlace] = []
        for entry in retained.manifests if retained is not None else ():
            self.note_manifest(entry.seq, entry.manifest)
        for keyframe in retained.keyframes if retained is not None else ():
            self.note_keyframe(keyframe)

    @property
    def newest_keyframe(self) -> int:
        """Newest version that can be had in full, -1 when none can."""
        return max((place.version for place in self.keyframes), default=-1)

    def note_manifest(self, seq: int, manifest: Manifest) -> None:
        """Take a manifest in; a second one for its version changes nothing."""
        if manifest.version in self.seqs:
            return
        self.seqs[manifest.version] = seq
        if manifest.delta is not None:
            self.deltas[manifest.version] = manifest.delta.upload_id
        if manifest.keyframe is not None:
            self._place(manifest.version, manifest.keyframe)

    def note_keyframe(self, keyframe: Keyframe) -> None:
        """Take a keyframe record in; it counts only while its version's manifest is there."""
        if keyframe.version in self.seqs:
            self._place(keyframe.version, keyframe.artefact)

    def keepers(self, needed: int) -> list[KeyframePlace]:
        """Return the keyframes at or below `needed`, the newest version first.

        The first of them that is intact and everything after it must stay.
        """
        below = [place for place in self.keyframes if place.version <= needed]
        return sorted(below, key=lambda place: place.version, reverse=True)

    def needed_uploads(self, kept: int) -> frozenset[str]:
        """Return the uploads on the chunk stream that followers from version `kept` on may ask for.

        The newest delta is among them even if nobody needs it: whatever is being uploaded now lies
        behind it, and is not purged.
        """
        deltas = {u for version, u in self.deltas.items() if version > kept}
        if self.deltas:
            deltas.add(self.deltas[max(self.deltas)])
        places = {p.upload_id for p in self.keyframes if p.version >= kept and p.num_chunks}
        return frozenset(deltas | places)

    def drop_below(self, kept: int) -> list[KeyframePlace]:
        """Forget the versions below `kept`; return their keyframes that are files."""
        files = [p for p in self.keyframes if p.version < kept and not p.num_chunks]
        self.seqs = {v: seq for v, seq in self.seqs.items() if v >= kept}
        self.deltas = {v: upload for v, upload in self.deltas.items() if v >= kept}
        self.keyframes = [p for p in self.keyframes if p.version >= kept]
        return files

    def forget(self, place: KeyframePlace) -> None:
        """Strike a keyframe that is not what it should be: it is no base to rely on."""
        self.keyframes.remove(place)

    def _place(self, version: int, artefact: Artefact) -> None:
        self.keyframes.append(KeyframePlace(version, artefact.upload_id, artefact.num_chunks))
