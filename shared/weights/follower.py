"""Following the policy: every published version, or the newest, exact or not at all."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Container, Mapping
from typing import Literal

from shared.runtime.bus import Bus
from shared.runtime.logs import Log
from shared.weights.chunks import download
from shared.weights.digests import specs_bytes
from shared.weights.errors import MissingVersion, WeightsError
from shared.weights.history import State, WeightHistory
from shared.weights.manifest_log import read_head_seq
from shared.weights.manifest_tail import ManifestTail
from shared.weights.offload import crunch
from shared.weights.quarantine import Quarantine
from shared.weights.rebuild import changed_names, from_delta, from_keyframe
from shared.weights.route import Step, route
from shared.wire.codec import decode
from shared.wire.errors import WireError
from shared.wire.weights import Control, Manifest

OnHead = Callable[[Manifest, State, frozenset[str] | None], Awaitable[None]]
"""(manifest, state, names of tensors that differ from the last head shown, None = all)."""
OnVersion = Callable[[Manifest, State], Awaitable[None]]


class Follower:
    """Materialises published versions into a history.

    Consumes the manifest log and the chunk stream; waits for chunks, with a bound; unblocked by
    new manifests and by its own retry timer. A version is shown only after its digests agree;
    whatever goes wrong leaves what is held untouched and is tried again by another way.
    """

    def __init__(
        self,
        bus: Bus,
        history: WeightHistory,
        *,
        log: Log,
        chunk_timeout_s: float = 2.0,
        retry_s: float = 2.0,
    ) -> None:
        """Follow into `history`.

        Args:
            bus: where from.
            history: where to; eviction is the caller's with start="oldest_needed", the
                follower's (everything below the head) with start="newest".
            log: INFO per head, WARNING per resync.
            chunk_timeout_s: how long to ask for a chunk that is not there.
            retry_s: pause before something that failed is tried again; doubles per failure.
        """
        self._bus = bus
        self._history = history
        self._log = log
        self._chunk_timeout_s = chunk_timeout_s
        self._retry_s = retry_s
        self._tail = ManifestTail(bus, log)
        self._ensuring = asyncio.Lock()
        self._quarantine = Quarantine(retry_s)
        self._owed: set[int] = set()
        self._shown: Manifest | None = None
        self.bytes_fetched = 0
        self.resyncs = 0
        """Artefacts that could not be used: gone, corrupt, or for another base."""
        self.versions_applied = 0
        self.heads_shown = 0
        self.seconds = 0.0
        """Spent fetching and applying."""

    @property
    def newest_known(self) -> int:
        """Newest version in the log; the lag is `newest_known - history.newest`."""
        return self._tail.newest

    @property
    def refused(self) -> Mapping[int, str]:
        """Manifests of an unreadable format: log sequence -> why. Not empty: be unready."""
        return self._tail.refused

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
                batch waits for it. It must not write to the tensors.
            start: "newest" skips what it can; "oldest_needed" materialises every version from
                the learner's low-water mark on.
            on_version: called per materialised version, before `on_head`; ascending except for
                a version that was missing and healed later.

        Raises:
            ExceptionGroup: of BusUnavailable when the bus did not answer within its own bound,
                and of whatever the callbacks raise.
        """
        low = await self._low_water_mark() if start == "oldest_needed" else None
        known = await read_head_seq(self._bus)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._tail.run())
            # A joiner must not step through the log it is about to skip.
            await self._tail.wait_read_to(known)
            cursor = -1 if low is None else low - 1
            while True:
                seen = self._tail.read_to
                if low is None:
                    await self._advance_to_newest(on_version)
                else:
                    cursor = await self._advance_through(cursor, on_version)
                await self._show_head(on_head, evict=low is None)
                await self._tail.wait_growth(seen, self._retry_s)
                await self._tail.retry_refused()

    async def ensure(self, version: int, timeout_s: float) -> State:
        """Return a version, fetched again if need be, without disturbing the head.

        Needs `run` running beside it. A version that is fetched is held in the history.

        Raises:
            MissingVersion: it is gone from the bus for good.
            TimeoutError: not yet published, or not yet readable, within `timeout_s`.
            BusUnavailable: the bus did not answer within its own bound.
        """
        if version in self._history.versions:
            return self._history.materialise(version)
        async with asyncio.timeout(timeout_s):
            await self._tail.wait_settled(version)
            async with self._ensuring:
                tried: set[str] = set()
                while version not in self._history.versions:
                    held = self._history.versions
                    steps = route(self._tail.manifests, held, version, tried)
                    if steps is None:
                        raise MissingVersion(version, held)
                    await self._walk(steps, tried)
        return self._history.materialise(version)

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
        held = self._history.newest
        for target in sorted((v for v in self._tail.manifests if v > held), reverse=True):
            if await self._reach(target, {held}):
                await self._tell(target, on_version)
                return

    async def _advance_through(self, cursor: int, on_version: OnVersion | None) -> int:
        """Materialise all known versions above `cursor` and those still owed; return the new one.

        Owed versions below the low-water mark are needed by nobody any more.
        """
        if self._owed:
            low = await self._low_water_mark()
            self._owed = {v for v in self._owed if v >= low and v in self._tail.manifests}
        fresh = {v for v in self._tail.manifests if v > cursor}
        for version in sorted(self._owed | fresh):
            if await self._reach(version, self._history.versions):
                self._owed.discard(version)
                await self._tell(version, on_version)
            else:
                self._owed.add(version)
        return max(fresh, default=cursor)

    async def _reach(self, target: int, held: Container[int]) -> bool:
        """Materialise `target` by any way that is left; return whether it is held now."""
        if target in self._history.versions:
            return True
        while True:
            broken = self._quarantine.closed(time.monotonic())
            steps = route(self._tail.manifests, held, target, broken)
            if steps is None:
                return False
            if await self._walk(steps, None):
                return True

    async def _walk(self, steps: list[Step], tried: set[str] | None) -> bool:
        """Take the steps and hold the last one's version; False when an artefact failed.

        A failed artefact goes into `tried`, or into quarantine when that is None.
        """
        started = time.perf_counter()
        base: tuple[Manifest, State] | None = None
        for step in steps:
            if base is None and step.base is not None:
                base = self._history.manifest(step.base), self._history.materialise(step.base)
            try:
                base = step.manifest, await self._take_step(step, base)
            except WeightsError as error:
                self._resync(step, error, tried)
                self.seconds += time.perf_counter() - started
                return False
        assert base is not None, "a route to something not held has steps"
        self._history.append(*base, owned=True)
        self.versions_applied += len(steps)
        self.seconds += time.perf_counter() - started
        return True

    async def _take_step(self, step: Step, base: tuple[Manifest, State] | None) -> State:
        artefact = step.artefact
        data = await download(self._bus, artefact, timeout_s=self._chunk_timeout_s)
        self.bytes_fetched += len(data)
        size = specs_bytes(step.manifest.tensors)
        if step.base is None or base is None:
            return await crunch(size, lambda: from_keyframe(step.manifest, artefact, data))
        known = base
        return await crunch(size, lambda: from_delta(step.manifest, artefact, data, *known))

    def _resync(self, step: Step, error: WeightsError, tried: set[str] | None) -> None:
        self.resyncs += 1
        if tried is None:
            self._quarantine.add(step.artefact.upload_id, time.monotonic())
        else:
            tried.add(step.artefact.upload_id)
        self._log.warning(
            "weights_resync",
            version=step.manifest.version,
            artefact=step.artefact.kind,
            reason=str(error),
        )

    # --- showing
    async def _tell(self, version: int, on_version: OnVersion | None) -> None:
        if on_version is not None:
            await on_version(self._history.manifest(version), self._history.materialise(version))

    async def _show_head(self, on_head: OnHead, *, evict: bool) -> None:
        newest = self._history.newest
        if newest < 0 or (self._shown is not None and newest <= self._shown.version):
            return
        manifest, state = self._history.manifest(newest), self._history.materialise(newest)
        await on_head(manifest, state, changed_names(self._shown, manifest))
        self._shown = manifest
        self.heads_shown += 1
        if evict:
            self._history.evict_below(newest)
        self._log.info("head_shown", version=newest, lag=self.newest_known - newest)
