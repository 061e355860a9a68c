"""Publishing versions: bytes first, then the manifest append that allocates the number."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from shared.runtime.bus import Bus
from shared.runtime.errors import BusUnavailable
from shared.runtime.logs import Log
from shared.weights.artefact_writer import ArtefactWriter
from shared.weights.base_copy import BaseCopy
from shared.weights.digests import num_bytes, version_digest
from shared.weights.fence import append_manifest, refuse_if_late
from shared.weights.keyframe_store import KeyframeStore
from shared.weights.manifest_log import Logged, read_head, read_log, read_named_uploads
from shared.weights.offload import crunch
from shared.weights.orphans import ORPHAN_AGE_S, sweep_orphans
from shared.weights.purge import Purge
from shared.weights.retention import PublishedLog
from shared.weights.stored_version import store_version
from shared.wire.codec import decode, encode
from shared.wire.weights import Canary, Keyframe, Manifest


@dataclass(frozen=True, slots=True)
class Published:
    """A version that is on the bus."""

    manifest: Manifest
    num_bytes: int
    """Uploaded for it."""
    seconds: float


class Publisher:
    """The single writer of the manifest log.

    Two of them are harmless: the append of a version expects the sequence of the previous one,
    so that the slower publisher is fenced. Versions and keyframes are published one at a time.
    """

    def __init__(
        self,
        bus: Bus,
        *,
        model_id: str,
        producer: str,
        keyframe_every: int = 16,
        chunk_bytes: int = 1 << 20,
        store: KeyframeStore | None = None,
        threads: int = 1,
        log: Log,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Publish `model_id` in the name of `producer`; call `start` first.

        Args:
            bus: where to.
            model_id: goes into the manifests.
            producer: goes into the manifests: who wrote them.
            keyframe_every: `keyframe_due` after so many versions without one.
            chunk_bytes: upper bound of one chunk; the bus's message size bounds it, too.
            store: where keyframes go; None: on the bus.
            threads: that diff.
            log: INFO per version.
            clock: Unix seconds, for `published_at` and the age of orphans.
        """
        self._bus = bus
        self._model_id = model_id
        self._producer = producer
        self._keyframe_every = keyframe_every
        self._store = store
        self._threads = threads
        self._log = log
        self._clock = clock
        self._started = False
        self._lock = asyncio.Lock()
        """Held while the base copy is read or changed."""
        self._head: Logged | None = None
        self._base: BaseCopy | None = None
        """Of the head; None: unknown, or half written."""
        self._own_ids: set[str] = set()
        """Uploads whose append may have been stored without our knowing."""
        self._published = PublishedLog()
        self._artefacts = ArtefactWriter(bus, store, chunk_bytes)
        self._purge = Purge(bus, store, self._artefacts.first_seqs, log)

    @property
    def head(self) -> Manifest | None:
        """Newest version, as of the last `start` or `publish`."""
        return self._head.manifest if self._head else None

    @property
    def keyframe_due(self) -> bool:
        """Whether `keyframe_every` versions were published since the last one available in full."""
        if self._head is None or self._base is None:
            return False
        return self._head.manifest.version >= (
            self._published.newest_keyframe + self._keyframe_every
        )

    @property
    def holds(self) -> bool:
        """Whether the head's bytes are here: see `hold`."""
        return self._base is not None

    async def start(self) -> Manifest | None:
        """Read the log; its head is what the next version is appended to.

        Raises:
            WireError: the head was written in a format that this code cannot read.
        """
        self._head = await read_head(self._bus)
        self._base = None
        self._published = PublishedLog(await read_log(self._bus))
        self._started = True
        return self.head

    async def manifest(self, version: int) -> Manifest | None:
        """Return the committed manifest of a version, None when it is not in the log (any more)."""
        seq = self._published.seqs.get(version)
        record = None if seq is None else await self._bus.get("manifests", seq)
        return None if record is None else decode(record.payload, Manifest)

    async def hold(self, state: Mapping[str, torch.Tensor]) -> bool:
        """Take over the head's own bytes, as a restarted publisher must before it can go on.

        Until then there is nothing to make a delta against or a keyframe from.

        Args:
            state: nobody may write to these tensors any more.

        Returns:
            Whether they are the head's bytes.
        """
        async with self._lock:
            return await self._hold(state)

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
            state: live weights, which must not change before this returns.
            canary: scored from exactly these bytes.
            epoch: fork count of the lineage.
            optimizer_steps: done so far.
            previous_state: the head's tensors, after a restart: see `hold`. Without them (or when
                they are not the head's bytes) the version is published in full, without a delta.

        Raises:
            Fenced: another publisher appended in between.
            Fatal: the number was given to other bytes by an earlier call whose outcome was open.
            WrongBase: names, shapes or dtypes are not those of the head.
            BusError: the bus refused or did not answer; calling again with the same state is safe.
        """
        assert self._started, "call start() first"
        async with self._lock:
            started = time.perf_counter()
            if self._base is None and previous_state is not None:
                await self._hold(previous_state)
            upload_id = uuid.uuid4().hex
            self._own_ids.add(upload_id)
            head = self._head
            stored = await store_version(
                self._artefacts, upload_id, state, self._base, threads=self._threads
            )
            uploaded_at = self._clock()
            manifest = Manifest(
                version=0 if head is None else head.manifest.version + 1,
                parent=None if head is None else head.manifest.version,
                epoch=epoch,
                model_id=self._model_id,
                upload_id=upload_id,
                delta=stored.delta,
                keyframe=stored.keyframe,
                tensors=stored.tensors,
                digest=version_digest(stored.tensors),
                sha256=stored.sha256,
                canary=canary,
                optimizer_steps=optimizer_steps,
                published_at=self._clock(),
                producer=self._producer,
            )
            refuse_if_late(self._clock() - uploaded_at, f"version {manifest.version}")
            entry = await append_manifest(self._bus, manifest, after=head, own_ids=self._own_ids)
            self._head = entry
            self._published.note_manifest(entry.seq, entry.manifest)
            self._own_ids = {entry.manifest.upload_id}
            self._base = None
            moved = await stored.move_base(state)
            self._base = stored.base if moved.error is None else None
            moved.result()
        seconds = time.perf_counter() - started
        self._log.info(
            "version_published",
            version=entry.manifest.version,
            digest=entry.manifest.digest,
            num_bytes=stored.num_bytes,
            keyframe=stored.keyframe is not None,
            seconds=round(seconds, 4),
        )
        return Published(entry.manifest, stored.num_bytes, seconds)

    async def publish_keyframe(self, *, reason: Literal["due", "wanted"]) -> Keyframe | None:
        """Make the head available in full; None while there is no copy of it (see `hold`).

        A version that is to be published meanwhile waits for it.

        Raises:
            Fatal: the copy is not the version that was published.
            BusError: the bus or the store refused or did not answer; calling again is safe.
        """
        async with self._lock:
            base, head = self._base, self.head
            if base is None or head is None:
                return None
            started = time.perf_counter()
            sha256 = await crunch(base.num_bytes, lambda: base.check(head))
            artefact = await self._artefacts.keyframe(f"{uuid.uuid4().hex}-k", base.state)
            uploaded_at = self._clock()
            keyframe = Keyframe(
                version=head.version,
                artefact=artefact,
                digest=head.digest,
                sha256=sha256,
                published_at=self._clock(),
                producer=self._producer,
            )
            refuse_if_late(self._clock() - uploaded_at, f"keyframe of version {head.version}")
            await self._bus.append(
                self._bus.subjects.keyframe, encode(keyframe), msg_id=artefact.upload_id
            )
            self._published.note_keyframe(keyframe)
        self._log.info(
            "keyframe_published",
            version=keyframe.version,
            reason=reason,
            num_bytes=artefact.num_bytes,
            seconds=round(time.perf_counter() - started, 4),
        )
        return keyframe

    async def purge_below(self, oldest_needed: int) -> int | None:
        """Drop what nobody needs; return the oldest version kept, None when nothing can go.

        Kept are the newest intact keyframe at or below `oldest_needed` and everything after it.
        Chunks older than all of that go by position, and with them the orphans of that time.

        Raises:
            BusError: the bus refused or did not answer; calling again is safe.
        """
        return await self._purge.below(self._published, oldest_needed)

    async def sweep_orphans(self, min_age_s: float = ORPHAN_AGE_S) -> int:
        """Drop uploads that neither manifest nor keyframe record names; return how many.

        Raises:
            BusError: the bus or the store refused or did not answer.
        """
        flying = set(self._artefacts.in_flight)  # before the log: what lands meanwhile is spared
        named = await read_named_uploads(self._bus)
        older_than = self._clock() - min_age_s
        try:
            orphans = await sweep_orphans(
                self._bus,
                self._store,
                # An object store may date a slow upload by its beginning.
                named=None if named is None else {*named, *flying, *self._artefacts.in_flight},
                older_than=older_than,
            )
        except OSError as error:
            raise BusUnavailable(f"weights.keyframe_store: {error}") from error
        if orphans:
            self._log.info("orphans_swept", uploads=orphans)
        return orphans

    async def _hold(self, state: Mapping[str, torch.Tensor]) -> bool:
        head = self.head
        if head is None:
            return False
        base = await crunch(num_bytes(state), lambda: BaseCopy(state, owned=True))
        if base.digest != head.digest:
            self._log.warning("held_state_is_not_head", head=head.version)
            return False
        self._base = base
        return True
