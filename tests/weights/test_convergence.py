"""Whatever happens in whatever order, followers end at the published bytes, and show no others."""

from __future__ import annotations

import asyncio
import random

import pytest

from shared.weights.digests import sha256_of
from shared.weights.history import WeightHistory
from shared.weights.manifest_log import read_log


class Run:
    """A publisher that is replaced now and then, and the faults of its log."""

    def __init__(self, new_publisher, mutate, state, faults, bus, rng: random.Random) -> None:
        self._new_publisher = new_publisher
        self._mutate = mutate
        self._faults = faults
        self._bus = bus
        self._rng = rng
        self.state = state
        self.hashes: list[str] = []

    async def restart(self) -> None:
        """With or without the bytes of the head."""
        self._p = await self._new_publisher(self._bus, keyframe_every=self._rng.randint(2, 9))
        if self.hashes and self._rng.random() < 0.7:
            assert await self._p.publisher.hold({n: t.clone() for n, t in self._head.items()})

    async def publish(self) -> None:
        self._head = self.state
        manifest = await self._p.put(self.state)
        assert manifest.version == len(self.hashes)
        self.hashes.append(sha256_of(self.state))
        self.state = self._mutate(self.state, self._rng.randrange(10**6))

    async def publish_a_broken_one(self) -> None:
        how = self._rng.choice(["missing", "truncated", "flipped", "swapped"])

        def damage(manifest):
            if manifest.delta is not None:
                self._faults.damage(manifest.delta, how)
            return manifest

        with self._faults.tamper(damage):
            await self.publish()

    async def lose_a_manifest(self) -> None:
        with self._faults.tamper(lose=True):
            await self.publish()
        await self.publish()  # not the head: its number would be given away again

    async def damage_keyframes(self) -> None:
        for keyframe in (await read_log(self._bus)).keyframes[-2:]:
            if self._faults.chunks(keyframe.artefact):
                self._faults.damage(keyframe.artefact, self._rng.choice(["missing", "flipped"]))

    async def purge(self) -> None:
        await self._p.publisher.purge_below(max(0, len(self.hashes) - self._rng.randint(1, 9)))

    async def sweep(self) -> None:
        await self._p.publisher.sweep_orphans(min_age_s=-60.0)

    async def keyframe(self) -> None:
        await self._p.publisher.publish_keyframe(reason="wanted")

    async def settle(self) -> None:
        await asyncio.sleep(0.005)


@pytest.mark.parametrize("seed", range(25))
async def test_followers_converge(
    new_publisher, make_state, mutate, faults, new_bus, following, seed: int
) -> None:
    rng = random.Random(seed)
    run = Run(new_publisher, mutate, make_state(seed), faults, new_bus(), rng)
    await run.restart()
    await run.publish()
    usual = [run.publish, run.publish, run.publish, run.settle, run.settle, run.keyframe]
    faulty = [run.publish_a_broken_one, run.lose_a_manifest, run.damage_keyframes]
    others = [run.restart, run.purge, run.sweep]
    history = WeightHistory()
    async with following("newest") as newest:
        async with following("oldest_needed", history=history) as every:
            for _ in range(15):
                await rng.choice(usual * 3 + faulty + others)()
            assert every.heads == sorted(every.heads)
        # The second one is restarted, its history with it or not.
        history = rng.choice([history, WeightHistory()])
        async with following("oldest_needed", history=history) as every:
            for _ in range(15):
                await rng.choice(usual * 3 + faulty + others)()
            await run.restart()
            await run.publish()
            await run.keyframe()
            await run.publish()
            await run.keyframe()
            last = len(run.hashes) - 1
            for f in (newest, every):
                await f.until_head(last)
                assert f.heads == sorted(f.heads)
                for version in f.history.versions:
                    assert await f.sha256(version) == run.hashes[version]
                await f.until(lambda f=f: not f.follower.keyframe_wanted)
