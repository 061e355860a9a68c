"""The manifest log as one follower knows it: read in order, unreadable entries tried again."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

from shared.runtime.bus import Bus, Record
from shared.runtime.logs import Log
from shared.wire.codec import decode
from shared.wire.errors import WireError
from shared.wire.weights import Keyframe, Manifest

PRUNE_EVERY = 64
"""Entries read between two looks at how far the log was purged."""


class ManifestTail:
    """Consumes the manifest log; unblocks whoever waits for growth."""

    def __init__(self, bus: Bus, log: Log) -> None:
        self._bus = bus
        self._log = log
        self._seqs: dict[int, int] = {}
        self._pruned_at = 0
        self._grown = asyncio.Condition()
        self.manifests: dict[int, Manifest] = {}
        """By version; those purged from the log are forgotten."""
        self.keyframes: dict[int, list[Keyframe]] = {}
        """Records by version, oldest first; a version's manifest may be gone or not yet read."""
        self.refused: dict[int, str] = {}
        """Unreadable manifests: log sequence -> why."""
        self.num_refused = 0
        """Manifests that could not be read when they came."""
        self.read_to = 0
        """Last sequence read."""
        self.newest = -1
        """Newest version seen."""

    async def run(self) -> None:
        """Read for ever."""
        async with aclosing(self._bus.read("manifests", 1)) as batches:
            async for batch in batches:
                for record in batch:
                    self._take(record)
                await self._grew(batch[-1].seq)

    async def wait_read_to(self, seq: int) -> None:
        """Wait until everything up to sequence `seq` was read."""
        async with self._grown:
            await self._grown.wait_for(lambda: self.read_to >= seq)

    async def wait_growth(self, seen: int, timeout_s: float) -> None:
        """Wait for an entry after sequence `seen`, at most `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                await self.wait_read_to(seen + 1)
        except TimeoutError:
            return
        if self.read_to - self._pruned_at >= PRUNE_EVERY:
            await self._prune()

    async def wait_settled(self, version: int) -> None:
        """Wait until the log has said all it will ever say about a version."""
        async with self._grown:
            await self._grown.wait_for(lambda: self._is_settled(version))

    async def retry_refused(self) -> None:
        """Look again at what could not be read; what was purged is given up."""
        for seq in list(self.refused):
            record = await self._bus.get("manifests", seq)
            if record is None:
                del self.refused[seq]
            else:
                self._take(record)
            if seq not in self.refused:
                await self._grew(self.read_to)

    def _take(self, record: Record) -> None:
        if record.subject == self._bus.subjects.manifest:
            self._take_manifest(record)
        elif record.subject == self._bus.subjects.keyframe:
            self._take_keyframe(record)

    def _take_manifest(self, record: Record) -> None:
        try:
            manifest = decode(record.payload, Manifest)
        except WireError as error:
            if record.seq not in self.refused:
                self.num_refused += 1
                self._log.error("manifest_refused", seq=record.seq, reason=str(error))
            self.refused[record.seq] = str(error)
            return
        self.refused.pop(record.seq, None)
        known = self.manifests.setdefault(manifest.version, manifest)
        self._seqs.setdefault(manifest.version, record.seq)
        if known.upload_id != manifest.upload_id:
            # The fence makes this impossible; a log that was restored by hand could hold it.
            self._log.error("version_named_twice", version=manifest.version, seq=record.seq)
        self.newest = max(self.newest, manifest.version)

    def _take_keyframe(self, record: Record) -> None:
        try:
            keyframe = decode(record.payload, Keyframe)
        except WireError as error:
            # Nothing is lost: a keyframe is a second way to a version that has a manifest.
            self._log.warning("keyframe_unreadable", seq=record.seq, reason=str(error))
            return
        self.keyframes.setdefault(keyframe.version, []).append(keyframe)

    async def _grew(self, read_to: int) -> None:
        async with self._grown:
            self.read_to = read_to
            self._grown.notify_all()

    def _is_settled(self, version: int) -> bool:
        if version in self.manifests:
            return True
        if version > self.newest:
            return False
        # A manifest that we cannot read yet may be the one.
        return not self.refused or version < min(self.manifests, default=0)

    async def _prune(self) -> None:
        self._pruned_at = self.read_to
        first_seq = (await self._bus.stream_state("manifests")).first_seq
        for version in [v for v, seq in self._seqs.items() if seq < first_seq]:
            del self._seqs[version], self.manifests[version]
        oldest = min(self.manifests, default=0)
        for version in [v for v in self.keyframes if v < oldest]:
            del self.keyframes[version]
