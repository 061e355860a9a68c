"""Publishing versions: chunks first, then the manifest append that allocates the number."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from shared.runtime.bus import Bus
from shared.runtime.errors import BusUnavailable, Conflict, Fatal, Fenced
from shared.runtime.logs import Log
from shared.weights import deltas, keyframes
from shared.weights.chunks import upload
from shared.weights.digests import num_bytes, sha256_of, specs, version_digest
from shared.weights.manifest_log import Logged, read_head, read_retained
from shared.weights.offload import crunch
from shared.weights.orphans import ORPHAN_AGE_S, sweep_orphans
from shared.weights.retention import KeyframePlace, oldest_kept
from shared.wire.codec import decode, encode
from shared.wire.weights import Canary, Manifest, TensorSpec

SHA256_BYTES = 64 * 1024 * 1024
"""Models up to this size carry a full hash on every version, larger ones on keyframes."""


@dataclass(frozen=True, slots=True)
class Published:
    """A version that is on the bus."""

    manifest: Manifest
    num_bytes: int
    """Uploaded for it."""
    seconds: float


@dataclass(frozen=True, slots=True)
class _Base:
    """The previous version as this publisher holds it."""

    state: Mapping[str, torch.Tensor]
    tensors: tuple[TensorSpec, ...]


def verify_same(manifest: Manifest, state: Mapping[str, torch.Tensor]) -> bool:
    """Return whether `state` is, bit for bit, the version that `manifest` describes.

    A restored learner asks this of every version it re-derives: the same bytes keep their number
    and are not published again.
    """
    return version_digest(specs(state)) == manifest.digest


class Publisher:
    """The single writer of the manifest log.

    Two of them are harmless: the append of a version expects the sequence of the previous one,
    so that the slower publisher is fenced.
    """

    def __init__(
        self,
        bus: Bus,
        *,
        model_id: str,
        producer: str,
        keyframe_every: int = 16,
        chunk_bytes: int = 1 << 20,
        log: Log,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Publish `model_id` in the name of `producer`; call `start` first.

        Args:
            bus: where to.
            model_id: goes into the manifests.
            producer: goes into the manifests: who wrote them.
            keyframe_every: a full copy at every so-manieth version, beside its delta.
            chunk_bytes: upper bound of one chunk; the bus's message size bounds it, too.
            log: INFO per version.
            clock: Unix seconds, for `published_at` and the age of orphans.
        """
        self._bus = bus
        self._model_id = model_id
        self._producer = producer
        self._keyframe_every = keyframe_every
        self._chunk_bytes = chunk_bytes
        self._log = log
        self._clock = clock
        self._started = False
        self._head: Logged | None = None
        self._base: _Base | None = None
        self._own_ids: set[str] = set()
        """Uploads whose append may have been stored without our knowing."""
        self._seqs: dict[int, int] = {}
        self._keyframes: list[KeyframePlace] = []

    @property
    def head(self) -> Manifest | None:
        """Newest version, as of the last `start` or `publish`."""
        return self._head.manifest if self._head else None

    async def start(self) -> Manifest | None:
        """Read the log; its head is what the next version is appended to.

        Raises:
            WireError: the head was written in a format that this code cannot read.
        """
        self._head = await read_head(self._bus)
        self._base = None
        self._seqs, self._keyframes = {}, []
        for entry in await read_retained(self._bus):
            self._note(entry)
        self._started = True
        return self.head

    async def manifest(self, version: int) -> Manifest | None:
        """Return the committed manifest of a version, None when it is not in the log (any more)."""
        seq = self._seqs.get(version)
        record = None if seq is None else await self._bus.get("manifests", seq)
        return None if record is None else decode(record.payload, Manifest)

    async def publish(
        self,
        state: Mapping[str, torch.Tensor],
        *,
        canary: Canary,
        epoch: int,
        optimizer_steps: int,
        previous_state: Mapping[str, torch.Tensor] | None = None,
    ) -> Published:
        """Publish `state` as the next version.

        Args:
            state: live views are fine: they are copied before the first wait.
            canary: scored from exactly these bytes.
            epoch: fork count of the lineage.
            optimizer_steps: done so far.
            previous_state: the head's tensors, after a restart; without them (or when they are
                not the head's bytes) the version is a keyframe without delta.

        Raises:
            Fenced: another publisher appended in between.
            BusError: the bus refused or did not answer; calling again with the same state is safe.
        """
        assert self._started, "call start() first"
        started, started_at = time.perf_counter(), self._clock()
        own = {name: tensor.detach().clone() for name, tensor in state.items()}
        size = num_bytes(own)
        head = self._head
        tensors = await crunch(size, lambda: specs(own))
        base = await crunch(size, lambda: self._delta_base(previous_state))
        version = 0 if head is None else head.manifest.version + 1
        is_keyframe = base is None or version % self._keyframe_every == 0

        upload_id = uuid.uuid4().hex
        self._own_ids.add(upload_id)
        keyframe = delta = sha256 = None
        if is_keyframe:
            data = await crunch(size, lambda: keyframes.encode(own))
            keyframe = await upload(
                self._bus,
                "keyframe",
                data,
                upload_id=f"{upload_id}-k",
                encoding=keyframes.ENCODING,
                chunk_bytes=self._chunk_bytes,
            )
        if base is not None:
            known = base
            data = await crunch(
                size, lambda: deltas.encode(known.state, own, tensors=known.tensors)
            )
            delta = await upload(
                self._bus,
                "delta",
                data,
                upload_id=f"{upload_id}-d",
                encoding=deltas.CODEC,
                chunk_bytes=self._chunk_bytes,
            )
        if is_keyframe or size <= SHA256_BYTES:
            sha256 = await crunch(size, lambda: sha256_of(own))
        manifest = Manifest(
            version=version,
            parent=None if head is None else head.manifest.version,
            epoch=epoch,
            model_id=self._model_id,
            upload_id=upload_id,
            delta=delta,
            keyframe=keyframe,
            tensors=tensors,
            digest=version_digest(tensors),
            sha256=sha256,
            canary=canary,
            optimizer_steps=optimizer_steps,
            published_at=self._clock(),
            producer=self._producer,
        )
        if self._clock() - started_at > ORPHAN_AGE_S / 2:
            raise BusUnavailable(f"version {version}: the upload took too long, publish it again")
        self._head = await self._append(manifest, 0 if head is None else head.seq)
        self._note(self._head)
        self._base = _Base(own, tensors)
        self._own_ids = {self._head.manifest.upload_id}
        uploaded = sum(a.num_bytes for a in (keyframe, delta) if a is not None)
        seconds = time.perf_counter() - started
        self._log.info(
            "version_published",
            version=version,
            digest=manifest.digest,
            num_bytes=uploaded,
            keyframe=is_keyframe,
            seconds=round(seconds, 4),
        )
        return Published(self._head.manifest, uploaded, seconds)

    async def purge_below(self, oldest_needed: int) -> int | None:
        """Drop what nobody needs; return the oldest version kept, None when nothing can go.

        Kept are the newest keyframe at or below `oldest_needed` and everything after it. Chunks
        older than that keyframe go by position, and with them all orphans of that time.
        """
        kept = oldest_kept(self._keyframes, oldest_needed)
        if kept is None or min(self._seqs) == kept.version:
            return None
        first_chunk = await self._bus.last(self._bus.subjects.chunk(kept.upload_id, 0))
        if first_chunk is None:
            self._log.error("keyframe_vanished", version=kept.version)
            return None
        # Manifests first: a manifest without chunks would send followers searching.
        await self._bus.purge("manifests", kept.manifest_seq)
        await self._bus.purge("chunks", first_chunk.seq)
        self._seqs = {v: seq for v, seq in self._seqs.items() if v >= kept.version}
        self._keyframes = [k for k in self._keyframes if k.version >= kept.version]
        return kept.version

    async def sweep_orphans(self, min_age_s: float = ORPHAN_AGE_S) -> int:
        """Drop uploads that no manifest names; return how many."""
        orphans = await sweep_orphans(self._bus, older_than=self._clock() - min_age_s)
        if orphans:
            self._log.info("orphans_swept", uploads=orphans)
        return orphans

    async def _append(self, manifest: Manifest, expected_seq: int) -> Logged:
        subject = self._bus.subjects.manifest
        try:
            seq = await self._bus.append(
                subject,
                encode(manifest),
                expect_last_subject_seq=expected_seq,
                msg_id=manifest.upload_id,
            )
        except Conflict as conflict:
            record = await self._bus.last(subject)
            found = None if record is None else decode(record.payload, Manifest)
            if record is None or found is None or found.upload_id not in self._own_ids:
                owner = "nobody" if found is None else found.producer
                raise Fenced(
                    f"version {manifest.version} was published by {owner}: "
                    "another learner owns this run"
                ) from conflict
            if found.digest != manifest.digest:
                raise Fatal(
                    f"version {found.version} is committed with digest {found.digest}; a number "
                    f"is never reused for other bytes ({manifest.digest}): restart and replay"
                ) from conflict
            return Logged(record.seq, found)
        return Logged(seq, manifest)

    def _note(self, entry: Logged) -> None:
        version, keyframe = entry.manifest.version, entry.manifest.keyframe
        self._seqs[version] = entry.seq
        if keyframe is not None:
            self._keyframes.append(KeyframePlace(version, entry.seq, keyframe.upload_id))

    def _delta_base(self, previous_state: Mapping[str, torch.Tensor] | None) -> _Base | None:
        """Return the head's bytes and specs if this publisher has them."""
        if self._head is None:
            return None
        if self._base is not None:
            return self._base
        if previous_state is None:
            return None
        tensors = specs(previous_state)
        if version_digest(tensors) != self._head.manifest.digest:
            self._log.warning("previous_state_is_not_head", head=self._head.manifest.version)
            return None
        return _Base(previous_state, tensors)
