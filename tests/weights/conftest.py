from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from shared.runtime.logs import Log
from shared.runtime.memory_bus import MemoryBus
from shared.runtime.memory_server import MemoryServer
from shared.weights.canary import canary_tokens, make_canary
from shared.weights.digests import sha256_of, specs, version_digest
from shared.weights.follower import Follower
from shared.weights.history import WeightHistory
from shared.weights.publisher import Publisher
from shared.wire.codec import decode, encode
from shared.wire.subjects import Subjects
from shared.wire.weights import Artefact, Canary, Control, Manifest

State = dict[str, torch.Tensor]


def _canary() -> Canary:
    return make_canary(
        lambda ids: [np.zeros(len(i), np.float32) for i in ids],
        canary_tokens(10, 16, 0),
        torch.float32,
    )


@pytest.fixture
def canary() -> Canary:
    return _canary()


@pytest.fixture
def make_state() -> Callable[[int], State]:
    """A small state with every awkward kind of tensor."""

    def make(seed: int) -> State:
        g = torch.Generator().manual_seed(seed)
        return {
            "wte.weight": torch.randn(40, 8, generator=g),
            "half.weight": torch.randn(7, 5, generator=g).to(torch.bfloat16),
            "half2.weight": torch.randn(6, generator=g).to(torch.float16),
            "wide": torch.randn(9, generator=g, dtype=torch.float64),
            "scalar": torch.randn((), generator=g),
            "empty": torch.zeros(0, 3),
            "steps": torch.tensor([seed]),
        }

    return make


@pytest.fixture
def mutate() -> Callable[[State, int], State]:
    """A copy of a state in which a few elements and nothing else differ."""

    def change(state: State, seed: int, share: float = 0.1) -> State:
        g = torch.Generator().manual_seed(seed)
        new = {name: t.clone() for name, t in state.items()}
        for name in ("wte.weight", "half.weight", "wide"):
            flat = new[name].view(-1)
            picked = torch.rand(flat.shape, generator=g) < share
            flat[picked] += 1.0
        new["scalar"] += 1.0
        return new

    return change


@pytest.fixture
def make_manifest() -> Callable[..., Manifest]:
    def make(version: int, state: State, **changes: object) -> Manifest:
        tensors = specs(state)
        fields: dict[str, object] = {
            "version": version,
            "parent": version - 1 if version else None,
            "upload_id": f"u{version}",
            "delta": None,
            "keyframe": None,
            "tensors": tensors,
            "digest": version_digest(tensors),
            "sha256": None,
            "canary": _canary(),
            "published_at": 0.0,
            "producer": "test",
        }
        return Manifest(**(fields | changes))  # type: ignore[arg-type]

    return make


@pytest.fixture
async def server() -> MemoryServer:
    server = MemoryServer(max_payload=65536)
    await MemoryBus(Subjects("t"), server).create_streams()
    return server


@pytest.fixture
def new_bus(server: MemoryServer) -> Callable[[], MemoryBus]:
    return lambda: MemoryBus(Subjects("t"), server, retry_s=1.0)


@pytest.fixture
def new_publisher(
    new_bus: Callable[[], MemoryBus], canary: Canary
) -> Callable[..., Awaitable[SimpleNamespace]]:
    """A started publisher with `put(state)`, which publishes, and a keyframe when one is due.

    Chunks of 200 bytes, a keyframe every 4 versions.
    """

    async def make(bus: object = None, **options: object) -> SimpleNamespace:
        defaults: dict[str, object] = {
            "producer": "test",
            "keyframe_every": 4,
            "chunk_bytes": 200,
        }
        publisher = Publisher(
            bus or new_bus(),  # type: ignore[arg-type]
            model_id="policy",
            log=Log("test"),
            **(defaults | options),  # type: ignore[arg-type]
        )
        head = await publisher.start()

        async def put(state: State, **kwargs: object) -> Manifest:
            options = {"epoch": 0, "optimizer_steps": 0, "canary": canary} | kwargs
            published = await publisher.publish(state, **options)  # type: ignore[arg-type]
            if publisher.keyframe_due:
                await publisher.publish_keyframe(reason="due")
            return published.manifest

        return SimpleNamespace(publisher=publisher, head=head, put=put)

    return make


@pytest.fixture
def run_of(
    new_publisher: Callable[..., Awaitable[SimpleNamespace]],
    make_state: Callable[[int], State],
    mutate: Callable[[State, int], State],
) -> Callable[..., Awaitable[SimpleNamespace]]:
    """A publisher with n versions published, their manifests and states; `more` publishes on."""

    async def make(n: int, bus: object = None, **options: object) -> SimpleNamespace:
        p = await new_publisher(bus, **options)
        p.states = [make_state(0)]
        p.manifests = []

        async def more(count: int) -> None:
            for _ in range(count):
                p.manifests.append(await p.put(p.states[-1]))
                p.states.append(mutate(p.states[-1], len(p.states)))

        p.more = more
        await more(n)
        return p

    return make


class Faults:
    """What can go wrong with what a server holds, or is about to store."""

    def __init__(self, server: MemoryServer) -> None:
        self._server = server
        self._names = Subjects("t")
        self._stored = server.streams[self._names.stream("chunks")]

    def chunks(self, artefact: Artefact) -> list[int]:
        """Sequences of an artefact's chunks."""
        records = self._stored.records
        return [seq for seq, r in records.items() if f".{artefact.upload_id}." in r.subject]

    def remove(self, seq: int) -> None:
        self._stored.remove(seq)

    def damage(self, artefact: Artefact, how: str) -> None:
        """Make an artefact "missing", "truncated", "flipped" or "swapped"."""
        records = self._stored.records
        seqs = self.chunks(artefact)
        first, last = records[seqs[0]], records[seqs[-1]]
        if how == "missing":
            self._stored.remove(last.seq)
        elif how == "truncated":
            records[last.seq] = replace(last, payload=last.payload[:-1])
        elif how == "swapped":
            records[first.seq] = replace(first, payload=last.payload)
            records[last.seq] = replace(last, payload=first.payload)
        else:
            flipped = bytes([last.payload[0] ^ 1]) + last.payload[1:]
            records[last.seq] = replace(last, payload=flipped)

    async def low_water(self, mark: int) -> None:
        control = Control(phase="running", head_version=0, oldest_needed=mark, updated_at=0.0)
        await MemoryBus(self._names, self._server).put_control("control", encode(control))

    @contextmanager
    def tamper(
        self, change: Callable[[Manifest], Manifest] = lambda manifest: manifest, lose: bool = False
    ) -> Iterator[None]:
        """Let `change` see, damage or replace manifests before they are stored, or lose them."""
        original = self._server.append

        def append(
            name: str, subject: str, payload: bytes, expected: int | None, msg_id: str
        ) -> int:
            if subject != self._names.manifest:
                return original(name, subject, payload, expected, msg_id)
            payload = encode(change(decode(payload, Manifest)))
            seq = original(name, subject, payload, expected, msg_id)
            if lose:
                stream = self._server.streams[name]
                stream.remove(seq)
                stream.by_subject[subject] = seq  # what the fence compares with
            return seq

        self._server.append = append  # type: ignore[method-assign]
        try:
            yield
        finally:
            self._server.append = original  # type: ignore[method-assign]

    def trickling(self) -> MemoryBus:
        """A bus that pauses after every batch of a log."""

        class Trickling(MemoryBus):
            async def read(self, *args, **options):  # type: ignore[no-untyped-def]
                async with aclosing(super().read(*args, **options)) as batches:
                    async for batch in batches:
                        yield batch
                        await asyncio.sleep(0.005)

        return Trickling(self._names, self._server)


@pytest.fixture
def faults(server: MemoryServer) -> Faults:
    return Faults(server)


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


@pytest.fixture
def following(new_bus: Callable[[], MemoryBus]):  # type: ignore[no-untyped-def]
    """A running follower; with start="newest" its history keeps no past unless one is given."""

    @asynccontextmanager
    async def run(
        start: str = "newest",
        bus: object = None,
        history: WeightHistory | None = None,
        **options: object,
    ) -> AsyncIterator[Following]:
        history = history or WeightHistory(keep_past=start != "newest")
        defaults: dict[str, object] = {"chunk_timeout_s": 0.05, "retry_s": 0.05}
        follower = Follower(
            bus or new_bus(),  # type: ignore[arg-type]
            history,
            log=Log("test"),
            **(defaults | options),  # type: ignore[arg-type]
        )
        seen = Following(follower, history)
        task = asyncio.create_task(
            follower.run(seen.on_head, start=start, on_version=seen.on_version)  # type: ignore[arg-type]
        )
        try:
            yield seen
        finally:
            failed = task.done()
            task.cancel()
            results = await asyncio.gather(task, return_exceptions=True)
            if failed and isinstance(results[0], Exception):
                raise results[0]

    return run
