"""A follower under test."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from shared.weights.digests import sha256_of, specs, version_digest
from shared.weights.follower import Follower
from shared.weights.history import WeightHistory
from shared.wire.weights import Manifest


class Following:
    """A follower running in the background, and what it showed."""

    def __init__(self, follower: Follower, history: WeightHistory) -> None:
        self.follower = follower
        self.history = history
        self.heads: list[int] = []
        self.versions: list[int] = []
        self.changed: list[frozenset[str] | None] = []
        self.pause_s = 0.0

    async def on_head(self, manifest: Manifest, changed: frozenset[str] | None) -> None:
        assert await self.sha256(manifest.version) == manifest.sha256
        self.heads.append(manifest.version)
        self.changed.append(changed)
        await asyncio.sleep(self.pause_s)

    async def on_version(self, manifest: Manifest) -> None:
        assert await self.sha256(manifest.version) == manifest.sha256
        self.versions.append(manifest.version)

    async def sha256(self, version: int) -> str:
        """Hash of a version as the history lends it."""
        async with self.history.at(version) as state:
            assert version_digest(specs(state)) == self.history.manifest(version).digest
            return sha256_of(state)

    async def until(self, condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
        async with asyncio.timeout(timeout_s):
            while not condition():  # noqa: ASYNC110 - any condition, test code
                await asyncio.sleep(0.005)

    async def until_head(self, version: int, timeout_s: float = 5.0) -> None:
        await self.until(lambda: bool(self.heads) and self.heads[-1] == version, timeout_s)
