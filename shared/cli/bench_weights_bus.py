"""From `publish` to applied, over a real nats-server, for `make bench-weights`.

This process publishes; followers are processes of their own. On one machine the wall clock is one.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from statistics import median
from typing import Any

import uvloop

from shared.cli.bench_weights_cases import Case, Place
from shared.cli.bench_weights_follower import peak_rss_bytes
from shared.cli.bench_weights_local import local_times, transport_times
from shared.cli.bench_weights_manifests import empty_canary
from shared.cli.bench_weights_models import Model, State, open_model
from shared.cli.processes import child_environment, spawn
from shared.runtime import nats_server
from shared.runtime.logs import Log, configure
from shared.runtime.nats_bus import connect
from shared.runtime.sections import BusSection
from shared.weights.keyframe_store import KeyframeStore
from shared.weights.publisher import Publisher
from shared.wire.subjects import Subjects

RUN = "bench"
STARTS = ("newest", "oldest_needed")
"""How the followers follow: one like a rollout, one like an oracle."""
APPLIED_WITHIN_S = 300.0
NEVER = 1 << 30
"""Keyframe period: only the first version has one."""


class Member:
    """A follower process, as the publisher's process sees it."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def begin(cls, job: dict[str, Any]) -> Member:
        """Start one."""
        return cls(
            await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "shared.cli.bench_weights_follower", json.dumps(job)),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                env=child_environment(os.environ),
            )
        )

    async def applied(self, version: int) -> float:
        """Wait until it has applied a version; return when that was, Unix seconds."""
        async with asyncio.timeout(APPLIED_WITHIN_S):
            while True:
                told = await self._next()
                if told.get("version") == version:
                    return float(told["at"])

    async def end(self) -> dict[str, Any]:
        """Let it finish; return its last words, among them `peak_rss_bytes`."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        async with asyncio.timeout(30):
            while "peak_rss_bytes" not in (told := await self._next()):
                pass
            await self._process.wait()
        return told

    def kill(self) -> None:
        """End it if it still runs."""
        if self._process.returncode is None:
            self._process.kill()

    async def _next(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        if not line:
            raise RuntimeError("a follower ended early; its reason is in the log")
        return json.loads(line)


async def measure(case: Case, model: Model, place: Place, folder: Path) -> dict[str, Any]:
    """Return one way of joining's fields of a case's row; times from the first way only."""
    timed = place == case.joins[0]
    threads = num_threads()
    store = (folder / "keyframes").resolve().as_uri() if place == "store" else ""
    async with _server(folder) as url:
        log = Log("bench-publisher")
        bus = await connect(BusSection(url=url), Subjects(RUN), "publisher", log)
        await bus.create_streams()
        publisher = Publisher(
            bus,
            model_id="policy",
            producer="bench",
            keyframe_every=NEVER,
            store=KeyframeStore(store, {}) if store else None,
            threads=threads,
            log=log,
        )
        await publisher.start()
        state = model.first()
        published = await _publish(publisher, state)
        row: dict[str, Any] = {f"keyframe_{place}_s": time.time() - published[1]}
        members: list[Member] = []
        try:
            for start in STARTS if timed else STARTS[:1]:
                job = {"url": url, "run": RUN, "store": store, "threads": threads, "start": start}
                members.append(await Member.begin(job))
            row |= await _publications(case, model, publisher, state, members, timed=timed)
        finally:
            for member in members:
                member.kill()
        row["publisher_peak_rss_bytes"] = peak_rss_bytes()
        if timed:
            before = {name: tensor.clone() for name, tensor in state.items()}
            model.advance(state)
            rounds = case.publications
            local = local_times(before, state, folder / "delta", threads, rounds)
            over_bus = await transport_times(bus, local.delta, rounds)
            row |= {"threads": threads, "local_file_s": local.total_s}
            row["transport_only_s"] = {"local_file": local.transport_s, "bus": over_bus}
        await bus.close()
    return row


def num_threads() -> int:
    """Return how many threads the publisher and each follower use: as many as there are cores."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2


async def _publications(
    case: Case,
    model: Model,
    publisher: Publisher,
    state: State,
    members: list[Member],
    *,
    timed: bool,
) -> dict[str, Any]:
    """Publish to all members and, when timed, to one after the other has left."""
    version = 0
    for member in members:
        await member.applied(version)
    times: dict[str, list[float]] = {}
    returned: list[float] = []
    ends: list[dict[str, Any]] = []
    while members:
        # The first delta after a keyframe does not count: kernels and pages are cold.
        for repetition in range(case.publications + 1 if timed else 2):
            model.advance(state)
            version, begun = await _publish(publisher, state)
            done = time.time() - begun
            applied = [await member.applied(version) for member in members]
            if repetition and timed:
                times.setdefault(str(len(members)), []).append(max(applied) - begun)
                returned.append(done)
        ends.append(await members.pop().end())
    row: dict[str, Any] = {
        "peak_rss_bytes": max(end["peak_rss_bytes"] for end in ends),
        "resyncs": sum(end["resyncs"] for end in ends),
    }
    if timed:
        row["publish_to_applied_s"] = {n: median(times[n]) for n in sorted(times)}
        row["publish_s"] = median(returned)
    return row


async def _publish(publisher: Publisher, state: State) -> tuple[int, float]:
    """Return the version and when `publish` was called, Unix seconds."""
    begun = time.time()
    published = await publisher.publish(state, canary=empty_canary(), epoch=0, optimizer_steps=0)
    return published.manifest.version, begun


@asynccontextmanager
async def _server(folder: Path) -> AsyncGenerator[str]:
    """A nats-server of our own; its store is in `folder`."""
    port = nats_server.free_port()
    config = folder / "nats.conf"
    nats_server.write_config(config, port=port, store_dir=folder / "nats")
    command: Sequence[str] = (str(nats_server.find_binary()), "-c", str(config))
    server = await spawn(command, folder / "nats.log", child_environment(os.environ))
    url = f"nats://127.0.0.1:{port}"
    try:
        await asyncio.to_thread(nats_server.wait_healthy, url, 20.0)
        yield url
    finally:
        server.terminate()
        await server.wait()


def main(argument: str) -> None:
    """Measure for a JSON job and print the fields as a JSON object."""
    configure("WARNING")
    job = json.loads(argument)
    case = Case(**job["case"])
    model = open_model(case, Path(job["folder"]))
    row = uvloop.run(measure(case, model, job["place"], Path(job["work"])))
    print(json.dumps(row))


if __name__ == "__main__":
    main(sys.argv[1])
