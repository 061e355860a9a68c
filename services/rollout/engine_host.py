"""The engine of this process: given weights, checked, and rebuilt when it dies."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import torch

from services.rollout.engine import Engine, EngineDead, ScoringEngine
from services.rollout.qwen3_weights import cast_digest
from shared.runtime.logs import Log
from shared.weights.canary import canary_rows, compare_canary, proves_something
from shared.wire.weights import Manifest

State = Mapping[str, torch.Tensor]


class EngineHost:
    """Keeps one engine alive under the newest version.

    Args:
        make: builds an engine; not started.
        dtype: in which the engine holds the weights.
        log: ERROR per death.
    """

    def __init__(self, make: Callable[[], Engine], dtype: torch.dtype, log: Log) -> None:
        self._make = make
        self._dtype = dtype
        self._log = log
        self._engine = make()
        self._shown = -1
        """Version last tried; a dead engine was at it, or at an older one."""
        self._applied = False
        """The engine got the head, or the one that `changed` is relative to."""
        self._dead = False
        self._updating = False
        self._revived_for = -1
        self._past: dict[str, float] = {}
        """Counters of the engines that died, and the host's own."""
        self._writing = asyncio.Lock()
        self.problem = "no weights yet"
        """Why nothing can be sampled; empty when it can."""

    @property
    def engine(self) -> Engine:
        return self._engine

    @property
    def version(self) -> int:
        return self._engine.version

    @property
    def least_version(self) -> int:
        """A request that comes now is sampled under this version or a later one.

        While a version is written the engine holds requests back until it is there.
        """
        if self._updating and not self._dead and self._engine.version < 0:
            return self._shown
        return self._engine.version

    def counters(self) -> dict[str, float]:
        """Monotonic counters over all engines of this process."""
        present = self._engine.load().counters
        names = self._past.keys() | present.keys()
        return {n: self._past.get(n, 0.0) + present.get(n, 0.0) for n in names}

    async def start(self) -> None:
        await self._engine.start()

    async def close(self) -> None:
        await self._engine.close()

    async def show(self, manifest: Manifest, state: State, changed: frozenset[str] | None) -> None:
        """Swap the engine to a new head; a dead engine is rebuilt first.

        Raises:
            ValueError: the published state does not fit the model.
        """
        async with self._writing:
            await self._bring_up(manifest, state, changed)

    async def revive(self, manifest: Manifest, state: State) -> None:
        """Rebuild a dead engine, once per version: what kills it twice is the version.

        Args:
            manifest: of the newest version.
            state: its tensors; read until this returns.
        """
        async with self._writing:
            if self._dead and self._revived_for != manifest.version:
                self._revived_for = manifest.version
                await self._bring_up(manifest, state, None)

    def look(self) -> bool:
        """Return whether the engine has died without a caller to tell, and record it."""
        reason = self._engine.failure
        if not reason or self._dead:
            return False
        self.died(self._engine, EngineDead(reason))
        return True

    def died(self, engine: Engine, error: EngineDead) -> None:
        """Record what a caller got from `engine`; `revive` or the next head makes a new one."""
        if engine is self._engine and not self._dead:
            version = self._shown
            self._dead = True
            self.problem = f"the engine died at version {version}: {error}"
            self._log.error("engine_died", version=version, reason=str(error))

    async def _bring_up(
        self, manifest: Manifest, state: State, changed: frozenset[str] | None
    ) -> None:
        """Get a version into a living engine, or record why not."""
        self._shown = manifest.version
        try:
            if self._dead:
                await self._rebuild()
            complete = None if not self._applied else changed
            # Before the update, so that nothing is sampled between it and the comparison; in a
            # thread: seconds for a large model, in which turns go on and heartbeats are sent.
            expected = await asyncio.to_thread(cast_digest, state, self._dtype)
            self._updating = True
            await self._engine.update(manifest.version, state, complete)
            await self._verify(manifest, expected)
        except EngineDead as error:
            self.died(self._engine, error)
            # At once: nothing that the wrong weights sample may be answered.
            await self._engine.close()
            return
        finally:
            self._updating = False
        self._applied = True
        self.problem = ""

    async def _verify(self, manifest: Manifest, expected: str) -> None:
        """Hold the device copy against its source and, where that proves anything, the canary.

        Args:
            manifest: of the version.
            expected: digest that its cast copy must have.

        Raises:
            EngineDead: it is not the version.
        """
        found = self._engine.device_digest()
        if found != expected:
            raise EngineDead(f"the device copy has digest {found}, its source {expected}")
        engine, canary = self._engine, manifest.canary
        if not isinstance(engine, ScoringEngine) or not proves_something(canary, self._dtype):
            return
        result = compare_canary(canary, await engine.score(canary_rows(canary)))
        self._count("canary_checks")
        if not result.ok:
            self._count("canary_failures")
            raise EngineDead(
                f"its canary is off by {result.max_error:g}, allowed are {canary.tolerance:g}"
            )

    def _count(self, name: str) -> None:
        self._past[name] = self._past.get(name, 0.0) + 1.0

    async def _rebuild(self) -> None:
        self._past = self.counters()
        await self._engine.close()
        self._engine = self._make()
        self._applied = self._dead = False
        await self._engine.start()
