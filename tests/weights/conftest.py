from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from shared.runtime.logs import Log
from shared.runtime.memory_bus import MemoryBus
from shared.runtime.memory_server import MemoryServer
from shared.weights.canary import canary_tokens, make_canary
from shared.weights.digests import specs, version_digest
from shared.weights.follower import Follower
from shared.weights.history import WeightHistory
from shared.weights.publisher import Publisher
from shared.wire.subjects import Subjects
from shared.wire.weights import Canary, Manifest
from tests.weights.faults import Faults, FaultyBus
from tests.weights.following import Following

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


@pytest.fixture
def faults(server: MemoryServer) -> Faults:
    return Faults(server)


@pytest.fixture
def faulty(server: MemoryServer) -> FaultyBus:
    return FaultyBus(Subjects("t"), server)


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
