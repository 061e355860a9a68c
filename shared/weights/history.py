"""The versions of the policy that this process can materialise."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from shared.weights.cutting import Piece
from shared.weights.digests import sha256_of, specs_bytes
from shared.weights.errors import MissingVersion, WeightsError, WrongBase
from shared.weights.holdings import Holdings
from shared.weights.lineage import Hop
from shared.weights.links import Link
from shared.weights.loading import Load
from shared.weights.replica import Replica, State
from shared.weights.settled import Settled, settled
from shared.weights.spool import SPOOL_BYTES, Spool
from shared.wire.weights import Manifest

__all__ = ["State", "WeightHistory"]

HOP_SHA256_BYTES = 4 * 1024 * 1024
"""Up to this size the full hash is compared after every hop, where the manifest has one."""


class WeightHistory:
    """One full copy of the model and the deltas between the versions that it can become.

    The copy is lent to one consumer at a time, and moved by nobody meanwhile. Every hop is compared
    with the manifest of the version it leads to. A failure leaves what is held as it was, except
    where the fault turns out to lie in what is held: that is given up, never shown.
    """

    def __init__(
        self, *, keep_past: bool = True, threads: int = 1, spool_bytes: int = SPOOL_BYTES
    ) -> None:
        """Hold nothing yet.

        Args:
            keep_past: keep the deltas between versions; without, only the version taken in last.
            threads: that apply deltas.
            spool_bytes: what the deltas may take of the memory; the older ones go to files.
        """
        self._keep_past = keep_past
        self._spool_bytes = spool_bytes
        self._replica = Replica(threads=threads)
        self._holdings = Holdings()
        self._lock = asyncio.Lock()
        self._holder: asyncio.Task[object] | None = None
        self._cleared = False
        """Everything goes as soon as nobody uses it."""
        self.faults = 0
        """Deltas and copies that were held and turned out wrong."""

    @property
    def versions(self) -> tuple[int, ...]:
        """Held versions, ascending."""
        return () if self._cleared else self._holdings.versions

    @property
    def newest(self) -> int:
        """Newest held version, -1 when nothing is held."""
        return max(self.versions, default=-1)

    @property
    def position(self) -> int:
        """The version that the copy is at, -1 when nothing is held."""
        return self._holdings.position

    @property
    def bytes_held(self) -> int:
        """Memory of the copy and of the deltas."""
        return self._copy_bytes + self._holdings.bytes_in_memory

    @property
    def bytes_spilled(self) -> int:
        """What the deltas take of the disk."""
        return self._holdings.bytes_spilled

    def manifest(self, version: int) -> Manifest:
        """Return the manifest of a held version.

        Raises:
            MissingVersion: it is not held.
        """
        if version not in self.versions:
            raise MissingVersion(version, self.versions)
        return self._holdings.manifest(version)

    @asynccontextmanager
    async def at(self, version: int) -> AsyncGenerator[State, None]:
        """Lend the tensors of a version, read-only, until the block ends.

        They mean nothing after it. Others who want the copy wait, so that the block must not ask
        the same history for anything that moves it.

        Raises:
            MissingVersion: it is not held, or proved to be wrong. Never another version instead.
        """
        async with self._exclusive():
            if version not in self.versions:
                raise MissingVersion(version, self.versions)
            await self._move(version)
            assert self._holdings.position == version
            assert self._holdings.digest == self._replica.digest
            yield self._replica.state

    async def apply_delta(self, manifest: Manifest, base: int, spool: Spool) -> None:
        """Take in a version by a delta from `base`; nothing happens when it is held already.

        Args:
            manifest: of the version.
            base: version that the delta applies to, or the one it leads to: then it is taken back.
            spool: the delta; belongs to the history from now on, whatever happens.

        Raises:
            MissingVersion: `base` is not held.
            WrongBase: the delta is for another version or another model.
            Corrupt: it is no delta, or does not lead to what the manifest describes.
            OSError: the spool cannot be read, or the disk is full.
        """
        link: Link | None = None
        try:
            async with self._exclusive():
                if not self._holdings.has(manifest):
                    link = (await settled(spool.size, lambda: Link(spool))).result()
                    await self._extend(manifest, base, link)
                    await self._spill()
        finally:
            if link is None or not self._holdings.owns(link):
                spool.close()

    async def load_keyframe(self, manifest: Manifest, pieces: AsyncIterator[Piece]) -> None:
        """Take in a version in full; nothing happens when it is held already.

        Over held versions it becomes one more link. Without `keep_past` it replaces what is held:
        when it fails halfway nothing is held any more.

        Args:
            manifest: of the version.
            pieces: a safetensors file. What it raises passes through; it is closed at the end.

        Raises:
            WrongBase: it is another model than the one held.
            Corrupt: it is not the version that the manifest describes.
            OSError: the disk is full.
        """
        try:
            async with self._exclusive():
                if not self._holdings.has(manifest):
                    await self._load(manifest, pieces)
                    await self._spill()
        finally:
            if isinstance(pieces, AsyncGenerator):
                await pieces.aclose()

    async def verify(self, version: int, sha256: str) -> bool:
        """Compare every byte of a version; when it is wrong give up everything and return False.

        Raises:
            MissingVersion: it is not held.
        """
        async with self.at(version) as state:
            found = (await settled(self._copy_bytes, lambda: sha256_of(state))).result()
            if found != sha256:
                self._doubt()
        return found == sha256

    def evict_below(self, version: int) -> tuple[int, ...]:
        """Drop versions older than `version`, never the newest; return what was dropped.

        `version` is the low-water mark `oldest_needed`: whatever is still referenced stays. Their
        memory follows once they connect no others and the copy has moved on.
        """
        dropped = () if self._cleared else self._holdings.evict_below(version)
        self._tidy_unless_lent()
        return dropped

    def clear(self) -> None:
        """Give up everything; a block that holds a version ends as usual."""
        self._cleared = True
        self._tidy_unless_lent()

    # --- one at a time
    @asynccontextmanager
    async def _exclusive(self) -> AsyncGenerator[None, None]:
        if self._holder is not None and self._holder is asyncio.current_task():
            raise RuntimeError("the block that holds a version would wait for itself")
        async with self._lock:
            self._holder = asyncio.current_task()
            try:
                yield
            finally:
                self._holder = None
                self._tidy()

    def _tidy_unless_lent(self) -> None:
        if not self._lock.locked():
            self._tidy()

    def _tidy(self) -> None:
        """Give back what nobody needs, or everything when the copy is not what it should be."""
        if self._cleared or self._replica.digest != self._holdings.digest:
            self._holdings.clear()
            self._replica.take()
            self._cleared = False
        else:
            self._holdings.prune()

    def _doubt(self) -> None:
        self.faults += 1
        self._cleared = True

    # --- inside `_exclusive`
    @property
    def _copy_bytes(self) -> int:
        position = self._holdings.position
        return 0 if position < 0 else specs_bytes(self._holdings.manifest(position).tensors)

    async def _move(self, version: int) -> None:
        """Move the copy to a version that is there.

        Raises:
            MissingVersion: a delta on the way, or the copy, is wrong and was given up.
        """
        for hop in self._holdings.path(version):
            goal = self._holdings.manifest(hop.to)
            sha256 = goal.sha256 if self._copy_bytes <= HOP_SHA256_BYTES else None
            done = await self._apply(hop.payload, goal, sha256, reverse=hop.reverse)
            if done.error is None:
                self._holdings.position = hop.to
            elif isinstance(done.error, WeightsError | OSError):
                self._give_up(hop)
                if done.cancelled is None:
                    raise MissingVersion(version, self.versions) from done.error
            done.result()

    def _give_up(self, hop: Hop[Link]) -> None:
        """A hop failed: the copy was at fault if it did not survive that, else the link."""
        if self._replica.is_empty:
            self._doubt()
        else:
            self.faults += 1
            self._holdings.cut(hop)

    async def _extend(self, manifest: Manifest, base: int, link: Link) -> None:
        """Move to `base` and from there along a new link."""
        held = self._holdings.manifest(base).digest
        reverse = link.reader.target == held and link.reader.base == manifest.digest
        if not reverse and link.reader.base != held:
            raise WrongBase(f"version {base}", link.reader.base, held)
        await self._move(base)
        done = await self._apply(link, manifest, manifest.sha256, reverse=reverse)
        if done.error is None:
            self._holdings.arrive(manifest, link if self._keep_past else None, reverse=reverse)
        elif self._replica.is_empty:
            self._doubt()
        done.result()

    async def _apply(
        self, link: Link, goal: Manifest, sha256: str | None, *, reverse: bool = False
    ) -> Settled[frozenset[str]]:
        return await settled(
            self._copy_bytes,
            lambda: self._replica.apply(
                link.reader, reverse=reverse, expected=goal.tensors, sha256=sha256
            ),
        )

    async def _load(self, manifest: Manifest, pieces: AsyncIterator[Piece]) -> None:
        size = specs_bytes(manifest.tensors)
        capture: Spool | None = None
        if self._keep_past and not self._replica.is_empty:
            # What is left of the memory that deltas may take.
            capture = Spool(max(0, self._spool_bytes - self._holdings.bytes_in_memory))
        link: Link | None = None
        try:
            load = Load(self._replica, manifest, capture)
            try:
                async for piece in pieces:
                    (await settled(size, partial(load.feed, piece))).result()
                done = await settled(size, load.finish)
                if done.error is None:
                    link = done.value
                    self.faults += capture is not None and link is None
                    self._holdings.arrive(manifest, link)
                done.result()
            except BaseException:
                await settled(size, load.abort)
                raise
        finally:
            if capture is not None and link is None:
                capture.close()

    async def _spill(self) -> None:
        """Move deltas to files, the older ones first, until the others fit into memory."""
        while self._holdings.bytes_in_memory > self._spool_bytes:
            link = self._holdings.oldest_in_memory()
            assert link is not None
            (await settled(link.spool.size, link.spill)).result()
