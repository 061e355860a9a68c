"""Bringing versions from the bus into a history, by whatever way is left."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncGenerator, Set
from contextlib import aclosing

from shared.runtime.bus import Bus
from shared.runtime.logs import Log
from shared.weights import deltas, keyframes
from shared.weights.chunks import download_to
from shared.weights.cutting import Piece
from shared.weights.errors import Corrupt, MissingVersion, WeightsError
from shared.weights.history import WeightHistory
from shared.weights.keyframe_store import KeyframeStore, artefact_pieces
from shared.weights.manifest_tail import ManifestTail
from shared.weights.quarantine import Quarantine
from shared.weights.route import Step, reachable, route
from shared.weights.spool import Spool
from shared.wire.weights import Artefact


class Materialiser:
    """Consumes artefacts; produces versions in a history, each compared with its manifest.

    An artefact that fails (gone, truncated, corrupt, for another base) leaves what is held as it
    is, goes into quarantine, and another way is looked for.
    """

    def __init__(
        self,
        bus: Bus,
        history: WeightHistory,
        tail: ManifestTail,
        *,
        store: KeyframeStore | None,
        log: Log,
        chunk_timeout_s: float,
        retry_s: float,
        spool_bytes: int,
    ) -> None:
        """Fetch what `tail` names into `history`; see `Follower` for the rest."""
        self._bus = bus
        self._history = history
        self._tail = tail
        self._store = store
        self._log = log
        self._chunk_timeout_s = chunk_timeout_s
        self._spool_bytes = spool_bytes
        self._quarantine = Quarantine(retry_s)
        self._closed: set[str] = set()
        """Uploads not to be tried in this pass."""
        self.counters: Counter[str] = Counter()
        """bytes_fetched, resyncs, versions_applied."""
        self.seconds = 0.0
        """Spent fetching and applying."""
        self.keyframes_used: set[str] = set()
        """Uploads that were read to their end and found right."""

    def begin_pass(self) -> None:
        """Let quarantines that are over end; from now on every artefact is tried once at most."""
        self._closed = set(self._quarantine.closed(time.monotonic()))

    async def reach(self, target: int) -> bool:
        """Hold `target` by any way that is not closed; return whether it is held now."""
        while target not in self._history.versions:
            if not await self._go(target, self._closed):
                return False
        return True

    async def reach_afresh(self, target: int) -> bool:
        """Hold `target` by any way, closed ones included, each tried once."""
        tried: set[str] = set()
        while target not in self._history.versions:
            if not await self._go(target, tried):
                return False
        return True

    def reachable(self, also_held: Set[int] = frozenset()) -> frozenset[int]:
        """Return the versions that a way is open to, supposing that `also_held` were held."""
        held = {*self._history.versions, *also_held}
        return reachable(self._tail.manifests, held, self._closed, self._tail.keyframes)

    def resync(self, version: int, what: str, reason: str) -> None:
        """Count and log something that cannot be used."""
        self.counters["resyncs"] += 1
        self._log.warning("weights_resync", version=version, artefact=what, reason=reason)

    async def _go(self, target: int, broken: set[str]) -> bool:
        """Go the cheapest way as far as it leads; False: there is none.

        An artefact that fails goes into `broken` and into quarantine.
        """
        held = frozenset(self._history.versions)
        steps = route(self._tail.manifests, held, target, broken, self._tail.keyframes)
        if steps is None:
            return False
        for step in steps:
            started = time.perf_counter()
            try:
                await self._step(step)
            except MissingVersion as error:
                # The base was evicted, or given up, meanwhile: the artefact is not to blame.
                self._log.info("base_gone", version=step.manifest.version, reason=str(error))
                return True
            except (WeightsError, OSError) as error:
                self.resync(step.manifest.version, step.artefact.kind, str(error))
                broken.add(step.artefact.upload_id)
                self._quarantine.add(step.artefact.upload_id, time.monotonic())
                return True
            finally:
                self.seconds += time.perf_counter() - started
            self.counters["versions_applied"] += 1
        return True

    async def _step(self, step: Step) -> None:
        artefact = step.artefact
        if step.base is None:
            _check_encoding(artefact, keyframes.ENCODING)
            await self._history.load_keyframe(step.manifest, self._counted(artefact))
            self.keyframes_used.add(artefact.upload_id)
            return
        _check_encoding(artefact, deltas.CODEC)
        spool = Spool(self._spool_bytes)
        try:
            await download_to(self._bus, artefact, spool, timeout_s=self._chunk_timeout_s)
        except BaseException:
            spool.close()
            raise
        self.counters["bytes_fetched"] += spool.size
        await self._history.apply_delta(step.manifest, step.base, spool)

    async def _counted(self, artefact: Artefact) -> AsyncGenerator[Piece, None]:
        pieces = artefact_pieces(self._bus, self._store, artefact, timeout_s=self._chunk_timeout_s)
        async with aclosing(pieces):
            async for piece in pieces:
                self.counters["bytes_fetched"] += len(piece)
                yield piece


def _check_encoding(artefact: Artefact, ours: str) -> None:
    if artefact.encoding != ours:
        raise Corrupt(
            f"{artefact.kind} {artefact.upload_id}", f"encoding {ours}", artefact.encoding
        )
