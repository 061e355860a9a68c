"""The recorder: everything in order, goes on after a restart, reads to the end at a stop."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgpack
import numpy as np
import safetensors.torch
import torch

from shared.cli.archive import archived_versions, read_stream, read_tickets_final, version_path
from shared.cli.recording import ARCHIVED_KEY, Recording
from shared.runtime.logs import Log
from shared.runtime.memory_bus import MemoryBus
from shared.weights.canary import make_canary
from shared.weights.publisher import Publisher
from shared.wire.codec import encode
from shared.wire.weights import Canary, Control

CANARY: Canary = make_canary(
    lambda rows: [np.zeros(len(row)) for row in rows],
    np.zeros((1, 4), dtype=np.int32),
    torch.float32,
)


@asynccontextmanager
async def recording(bus: MemoryBus, directory: Path) -> AsyncIterator[Recording]:
    """Run a recorder until the block ends, then let it finish in order."""
    stop = asyncio.Event()
    recorder = Recording(bus, directory, Log("recorder"), sync_s=0.02, catch_up_s=3.0)
    async with asyncio.TaskGroup() as group:
        group.create_task(recorder.run(stop))
        await asyncio.sleep(0)
        yield recorder
        stop.set()


async def publish(bus: MemoryBus, count: int) -> list[dict[str, torch.Tensor]]:
    publisher = Publisher(bus, model_id="policy", producer="test", log=Log("t"), keyframe_every=4)
    await publisher.start()
    generator = torch.Generator().manual_seed(0)
    states = []
    for step in range(count):
        states.append({"w": torch.randn(4, 3, generator=generator), "b": torch.zeros(2)})
        await publisher.publish(states[-1], canary=CANARY, epoch=0, optimizer_steps=step)
    return states


async def append(bus: MemoryBus, count: int, start: int = 0) -> None:
    for number in range(start, start + count):
        await bus.append(bus.subjects.terminal(f"t{number}"), b"terminal %d" % number)
        await bus.append(bus.subjects.score(f"t{number}"), b"score %d" % number)


async def test_every_stream_is_archived_in_order_to_its_end(bus: MemoryBus, tmp_path: Path) -> None:
    async with recording(bus, tmp_path):
        await append(bus, 30)
        await bus.append(bus.subjects.journal, b"last words")
    for name, word in (("terminals", b"terminal"), ("scores", b"score")):
        found = list(read_stream(tmp_path, name))
        assert [r.seq for r in found] == list(range(1, 31))
        assert [r.payload for r in found] == [b"%s %d" % (word, n) for n in range(30)]
        assert all(r.stored_at > 0 for r in found)
    assert [r.payload for r in read_stream(tmp_path, "journal")] == [b"last words"]


async def test_every_version_is_kept_aside_bit_for_bit(bus: MemoryBus, tmp_path: Path) -> None:
    async with recording(bus, tmp_path):
        states = await publish(bus, 7)
    assert archived_versions(tmp_path) == list(range(7))
    for version, state in enumerate(states):
        kept = safetensors.torch.load_file(version_path(tmp_path, version))
        assert set(kept) == {"w", "b"}
        assert all(torch.equal(kept[name], state[name]) for name in kept)


async def test_a_restarted_recorder_goes_on_where_the_files_end(
    bus: MemoryBus, tmp_path: Path
) -> None:
    async with recording(bus, tmp_path):
        await append(bus, 5)
        await publish(bus, 2)
    await append(bus, 5, start=5)
    # the learner needs only the newest versions by now; those kept aside are still owed
    control = Control(phase="running", head_version=5, oldest_needed=5, updated_at=0.0)
    await publish(bus, 4)
    await bus.put_control("control", encode(control))
    async with recording(bus, tmp_path):
        await append(bus, 5, start=10)
    assert [r.seq for r in read_stream(tmp_path, "terminals")] == list(range(1, 16))
    assert archived_versions(tmp_path) == list(range(6))


async def test_positions_are_published_only_after_they_are_durable(
    bus: MemoryBus, tmp_path: Path
) -> None:
    async with recording(bus, tmp_path):
        await append(bus, 12)
        await publish(bus, 3)
        async with asyncio.timeout(5):
            while True:
                payload = await bus.get_control(ARCHIVED_KEY)
                archived = msgpack.unpackb(payload) if payload else {}
                on_disk = [r.seq for r in read_stream(tmp_path, "terminals")]
                assert archived.get("terminals", 0) <= max(on_disk, default=0)
                if archived.get("terminals") == 12 and archived.get("versions") == 2:
                    break
                await asyncio.sleep(0.01)
    assert set(archived) == {
        "terminals", "scores", "journal", "manifests", "stats", "dead", "versions",
    }  # fmt: skip


async def test_tickets_that_nobody_finished_are_named_at_the_end(
    bus: MemoryBus, tmp_path: Path
) -> None:
    for number in range(3):
        await bus.append(bus.subjects.ticket(f"t{number}"), b"ticket")
    queue = await bus.work_queue("tickets", "env_agents", ack_wait_s=5, max_ack_pending=10)
    [job] = await queue.next(1, 1.0)
    await job.ack()
    await queue.close()
    async with recording(bus, tmp_path):
        assert read_tickets_final(tmp_path) is None
    assert read_tickets_final(tmp_path) == ("t1", "t2")


async def test_leases_are_archived_with_their_time_of_receipt(
    bus: MemoryBus, tmp_path: Path
) -> None:
    async with recording(bus, tmp_path):
        await asyncio.sleep(0.05)
        await bus.publish(bus.subjects.lease("rollout", "rollout-0"), b"lease")
        await asyncio.sleep(0.05)
    [lease] = read_stream(tmp_path, "leases")
    assert lease.payload == b"lease"
    assert lease.subject == "lagwise.r.lease.rollout.rollout-0"
