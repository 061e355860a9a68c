"""The processes of `test_kills.py`: a publisher and followers of a policy that anyone can compute.

Version v of this policy is a function of v, so that every process can say, without the bus, what
the right bytes are.
"""

from __future__ import annotations

import asyncio
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shared.runtime.logs import Log
from shared.runtime.nats_bus import NatsBus, connect
from shared.runtime.sections import BusSection
from shared.weights.canary import canary_tokens, make_canary
from shared.weights.digests import specs, version_digest
from shared.weights.follower import Follower
from shared.weights.history import WeightHistory
from shared.weights.publisher import Publisher
from shared.wire.codec import encode
from shared.wire.subjects import Subjects
from shared.wire.weights import Control, Manifest

RUN = "kills"
KEPT = 6
"""Versions behind the head that are still needed."""


def policy(version: int) -> dict[str, torch.Tensor]:
    """Version `version`: 40,000 bf16 and 5,000 fp32 weights, some of which each version changes."""
    narrow, wide = _bits(version)
    return {
        "narrow": torch.from_numpy(narrow).view(torch.float32).reshape(50, 100),
        "wide": torch.from_numpy(wide).view(torch.bfloat16).reshape(200, 200),
    }


_last: tuple[int, Any, Any] | None = None


def _bits(version: int) -> tuple[Any, Any]:
    """Step on from the version computed last; the steps from 0 would take most of the test."""
    global _last
    if _last is None or _last[0] > version:
        rng = np.random.default_rng(0)
        wide = rng.integers(0, 1 << 15, 40_000).astype(np.int16)
        _last = 0, rng.integers(0, 1 << 30, 5_000).astype(np.int32), wide
    at, narrow, wide = _last[0], _last[1].copy(), _last[2].copy()
    for v in range(at + 1, version + 1):
        rng = np.random.default_rng(v)
        wide[rng.random(len(wide)) < 0.02] += 1
        narrow[rng.random(len(narrow)) < 0.5] ^= v
    _last = version, narrow, wide
    return narrow.copy(), wide.copy()


@lru_cache(maxsize=128)
def digest_of(version: int) -> str:
    """Return the digest that version `version` must have."""
    return version_digest(specs(policy(version)))


def publish(url: str, log_path: str, until: int) -> None:
    """Publish versions up to `until`, from wherever the log stands."""
    asyncio.run(_publish(url, Path(log_path), until))


def follow(url: str, log_path: str, *, keep_past: bool) -> None:
    """Follow for ever; one line per version shown: `version ok` or `version WRONG`."""
    asyncio.run(_follow(url, Path(log_path), keep_past))


async def _bus(url: str, name: str) -> NatsBus:
    section = BusSection(url=url, request_timeout_s=1.0, retry_s=60.0, connect_timeout_s=30.0)
    bus = await connect(section, Subjects(RUN), name, Log(name))
    await bus.create_streams()
    return bus


async def _publish(url: str, log_path: Path, until: int) -> None:
    bus = await _bus(url, "publisher")
    publisher = Publisher(
        bus, model_id="policy", producer="p", keyframe_every=5, chunk_bytes=4096, log=Log("p")
    )
    head = await publisher.start()
    version = -1 if head is None else head.version
    canary = make_canary(
        lambda ids: [np.zeros(len(i), np.float32) for i in ids],
        canary_tokens(10, 16, 0),
        torch.bfloat16,
    )
    previous = policy(version) if head is not None else None
    while version < until:
        published = await publisher.publish(
            policy(version + 1),
            canary=canary,
            epoch=0,
            optimizer_steps=version + 1,
            previous_state=previous,
        )
        version, previous = version + 1, None
        assert published.manifest.version == version
        assert published.manifest.digest == digest_of(version)
        _say(log_path, f"{version} ok")
        if publisher.keyframe_due:
            await publisher.publish_keyframe(reason="due")
        low = max(0, version - KEPT)
        control = Control(
            phase="running", head_version=version, oldest_needed=low, updated_at=time.time()
        )
        await bus.put_control("control", encode(control))
        await publisher.purge_below(low)
        await asyncio.sleep(0.02)
    _say(log_path, "done")
    while True:  # a follower may still need a keyframe
        await asyncio.sleep(1.0)
        await publisher.publish_keyframe(reason="wanted")


async def _follow(url: str, log_path: Path, keep_past: bool) -> None:
    bus = await _bus(url, "follower")
    history = WeightHistory(keep_past=keep_past)
    follower = Follower(bus, history, log=Log("f"), chunk_timeout_s=0.2, retry_s=0.1)

    async def check(version: int) -> None:
        async with history.at(version) as state:
            right = version_digest(specs(state)) == digest_of(version)
        _say(log_path, f"{version} {'ok' if right else 'WRONG'}")

    async def on_head(manifest: Manifest, changed: frozenset[str] | None) -> None:
        await check(manifest.version)
        if keep_past:
            history.evict_below(manifest.version - KEPT)
            for version in history.versions:  # back in time and forward again
                await check(version)

    await follower.run(on_head, start="oldest_needed" if keep_past else "newest")


def _say(path: Path, line: str) -> None:
    with path.open("a") as file:
        file.write(line + "\n")
