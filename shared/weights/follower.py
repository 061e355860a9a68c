"""Following the policy: every published version, or the newest, exact or not at all."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Literal

from shared.runtime.bus import Bus
from shared.runtime.logs import Log
from shared.weights.errors import MissingVersion
from shared.weights.history import WeightHistory
from shared.weights.keyframe_store import KeyframeStore
from shared.weights.manifest_log import read_end
from shared.weights.manifest_tail import ManifestTail
from shared.weights.materialiser import Materialiser
from shared.weights.showing import OnHead, OnVersion, Showing
from shared.weights.spool import SPOOL_BYTES
from shared.wire.codec import decode
from shared.wire.errors import WireError
from shared.wire.weights import Control

__all__ = ["Follower", "OnHead", "OnVersion"]


class Follower:
    """Materialises published versions into a history.

    Consumes the manifest log, the chunk stream and the keyframe store; waits for chunks, with a
    bound; unblocked by new entries of the log and by its own retry timer. A version is shown only
    after its digests agree; whatever goes wrong leaves what is shown untouched and is tried again
    by another way. Callbacks take the tensors themselves, with `history.at`.
    """

    def __init__(
        self,
        bus: Bus,
        history: WeightHistory,
        *,
        store: KeyframeStore | None = None,
        log: Log,
        chunk_timeout_s: float = 2.0,
        retry_s: float = 2.0,
        spool_bytes: int = SPOOL_BYTES,
    ) -> None:
        """Follow into `history`.

        Args:
            bus: where from.
            history: where to; eviction is the caller's with start="oldest_needed", the
                follower's (everything below the head) with start="newest".
            store: where keyframes may be, besides the bus.
            log: INFO per head, WARNING per resync.
            chunk_timeout_s: how long to ask for a chunk that is not there.
            retry_s: pause before something that failed is tried again; doubles per failure.
            spool_bytes: memory for a delta that is being fetched; what is more goes to a file.
        """
        self._bus = bus
        self._history = history
        self._log = log
        self._retry_s = retry_s
        self._tail = ManifestTail(bus, log)
        self._materialiser = Materialiser(
            bus,
            history,
            self._tail,
            store=store,
            log=log,
            chunk_timeout_s=chunk_timeout_s,
            retry_s=retry_s,
            spool_bytes=spool_bytes,
        )
        self._showing = Showing(history, self._materialiser, log)
        self._ensuring = asyncio.Lock()
        self._floor = 0
        """With start="oldest_needed": versions below it are nobody's concern."""
        self._told: set[int] = set()
        """Versions that `on_version` has seen, or would have."""
        self._missing: frozenset[int] = frozenset()
        self._faults = history.faults
        self._verified = -1
        """Newest version whose full hash was compared, or need not be any more."""

    @property
    def newest_known(self) -> int:
        """Newest version in the log; the lag is `newest_known - history.newest`."""
        return self._tail.newest

    @property
    def refused(self) -> Mapping[int, str]:
        """Manifests of an unreadable format: log sequence -> why. Not empty: be unready."""
        return self._tail.refused

    @property
    def keyframe_wanted(self) -> bool:
        """Whether a version is out of reach that a keyframe of the newest one would bring back."""
        if not self._missing:
            return False
        return not self._missing.isdisjoint(self._materialiser.reachable({self._tail.newest}))

    @property
    def bytes_fetched(self) -> int:
        """Of artefacts."""
        return self._materialiser.counters["bytes_fetched"]

    @property
    def resyncs(self) -> int:
        """What could not be used, and was tried again or gone around.

        Artefacts (gone, corrupt, for another base), manifests (of another format), faulty copies.
        """
        return self._materialiser.counters["resyncs"] + self._tail.num_refused

    @property
    def versions_applied(self) -> int:
        """Deltas and keyframes taken in."""
        return self._materialiser.counters["versions_applied"]

    @property
    def heads_shown(self) -> int:
        """Calls of `on_head` that came to their end."""
        return self._showing.heads_shown

    @property
    def seconds(self) -> float:
        """Spent fetching and applying."""
        return self._materialiser.seconds

    async def run(
        self,
        on_head: OnHead,
        *,
        start: Literal["newest", "oldest_needed"] = "newest",
        on_version: OnVersion | None = None,
    ) -> None:
        """Follow until cancelled.

        Args:
            on_head: called once per batch of new versions, with the newest of them; the next
                batch waits for it. Called again for the same version when its tensors turned out
                wrong and were fetched again.
            start: "newest" skips what it can; "oldest_needed" materialises every version from
                the learner's low-water mark on.
            on_version: called per version wanted, before `on_head`; ascending except for a
                version that was missing and healed later.

        Raises:
            ExceptionGroup: of BusUnavailable when the bus did not answer within its own bound,
                and of whatever the callbacks raise.
        """
        every = start == "oldest_needed"
        if every:
            self._floor = await self._low_water_mark()
        known = await read_end(self._bus)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._tail.run())
            # A joiner must not step through the log it is about to skip.
            await self._tail.wait_read_to(known)
            while True:
                seen = self._tail.read_to
                self._materialiser.begin_pass()
                if every:
                    await self._advance_through(on_version)
                else:
                    await self._advance_to_newest(on_version)
                await self._showing.show_head(on_head, newest_known=self._tail.newest)
                if not every:
                    self._history.evict_below(self._history.newest)
                await self._verify()
                if not self._look_for_faults():
                    await self._tail.wait_growth(seen, self._retry_s)
                await self._tail.retry_refused()

    async def ensure(self, version: int, timeout_s: float) -> None:
        """Hold a version, fetched again if need be, without disturbing the head.

        Needs `run` running beside it, and a history that keeps the past.

        Raises:
            MissingVersion: it is gone from the bus for good.
            TimeoutError: not yet published, or not yet readable, within `timeout_s`.
            BusUnavailable: the bus did not answer within its own bound.
        """
        if version in self._history.versions:
            return
        async with asyncio.timeout(timeout_s):
            await self._tail.wait_settled(version)
            async with self._ensuring:
                if not await self._materialiser.reach_afresh(version):
                    raise MissingVersion(version, self._history.versions)

    async def _low_water_mark(self) -> int:
        payload = await self._bus.get_control("control")
        if payload is None:
            return 0
        try:
            return decode(payload, Control).oldest_needed
        except WireError as error:
            self._log.warning("control_unreadable", reason=str(error))
            return 0  # everything there is: more than needed, never less

    # --- materialising
    async def _advance_to_newest(self, on_version: OnVersion | None) -> None:
        """Hold the newest version that there is a way to, and that is not older than what was."""
        wanted = target = self._tail.newest
        while target > self._history.newest and not await self._materialiser.reach(target):
            floor = max(self._history.newest + 1, self._showing.version)
            nearer = self._materialiser.reachable()
            target = max((v for v in nearer if v >= floor), default=-1)
        self._missing = frozenset({wanted} if wanted > self._history.newest else ())
        head = self._history.newest
        if head not in self._told and head >= 0:
            self._told = {head}
            await self._showing.tell(head, on_version)

    async def _advance_through(self, on_version: OnVersion | None) -> None:
        """Hold every version from the low-water mark on that there is a way to."""
        if self._missing:
            # Versions below the mark are needed by nobody any more.
            self._floor = max(self._floor, await self._low_water_mark())
        begins = not self._history.versions
        known = self._tail.manifests
        missing: set[int] = set()
        for version in sorted(v for v in known if v >= self._floor and v not in self._told):
            if not await self._materialiser.reach(version):
                missing.add(version)
                continue
            if begins:
                # Versions below the mark that led here are held for no other reason.
                self._history.evict_below(self._floor)
                begins = False
            self._told.add(version)
            await self._showing.tell(version, on_version)
        self._missing = frozenset(missing)
        self._told &= known.keys()

    async def _verify(self) -> None:
        """Compare the full hash that a new keyframe record names with the version as it is held."""
        records = self._tail.keyframes
        held = [v for v in self._history.versions if v in records and v > self._verified]
        if not held:
            return
        version = self._verified = max(held)
        digest = self._history.manifest(version).digest
        used = self._materialiser.keyframes_used
        intact = [record for record in records[version] if record.digest == digest]
        # A keyframe that was read a moment ago was compared with its hash then.
        if not intact or any(record.artefact.upload_id in used for record in intact):
            return
        try:
            if not await self._history.verify(version, intact[0].sha256):
                self._materialiser.resync(version, "copy", f"its sha256 is not {intact[0].sha256}")
        except MissingVersion as error:
            self._materialiser.resync(version, "copy", str(error))

    def _look_for_faults(self) -> bool:
        """Return whether something that was held proved wrong: then it is fetched and shown again.

        It was given up by the history; who was shown it may have taken what is wrong.
        """
        if self._history.faults == self._faults:
            return False
        self._faults = self._history.faults
        self._told &= frozenset(self._history.versions)
        self._showing.forget()
        return True
