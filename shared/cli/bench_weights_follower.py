"""One follower of `make bench-weights`, as a process of its own.

It prints a JSON line per version it has applied and verified, and when its input is closed one with
its peak memory.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

import uvloop

from shared.cli.peak_memory import peak_rss_bytes
from shared.runtime.logs import Log, configure
from shared.runtime.nats_bus import connect
from shared.runtime.sections import BusSection
from shared.weights.follower import Follower
from shared.weights.history import WeightHistory
from shared.weights.keyframe_store import KeyframeStore
from shared.wire.subjects import Subjects
from shared.wire.weights import Manifest


async def follow(job: dict[str, Any]) -> None:
    """Follow until the input is closed.

    Args:
        job: `url` and `run` of the bus, `store` (a folder, or empty), `threads`, and `start`:
            "newest" follows like a rollout, "oldest_needed" like an oracle, with a past.
    """
    log = Log("bench-follower", job["start"])
    bus = await connect(BusSection(url=job["url"]), Subjects(job["run"]), job["start"], log)
    history = WeightHistory(keep_past=job["start"] != "newest", threads=job["threads"])
    store = KeyframeStore(job["store"], {}) if job["store"] else None
    follower = Follower(bus, history, store=store, log=log)

    async def on_version(manifest: Manifest) -> None:
        say(version=manifest.version, at=time.time())

    async def on_head(manifest: Manifest, changed: frozenset[str] | None) -> None:
        pass

    ended = asyncio.Event()
    # Nobody writes to it: readable means closed.
    asyncio.get_running_loop().add_reader(sys.stdin.fileno(), ended.set)
    async with asyncio.TaskGroup() as group:
        following = follower.run(on_head, start=job["start"], on_version=on_version)
        running = group.create_task(following)
        await ended.wait()
        running.cancel()
    await bus.close()
    say(peak_rss_bytes=peak_rss_bytes(), resyncs=follower.resyncs, bytes_held=history.bytes_held)


def say(**fields: Any) -> None:
    """Print one JSON line at once."""
    print(json.dumps(fields), flush=True)


if __name__ == "__main__":
    configure("WARNING")
    uvloop.run(follow(json.loads(sys.argv[1])))
