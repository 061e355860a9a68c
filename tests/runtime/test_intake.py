"""Unreadable payloads are kept with their reason, foreign ones handed back, the service goes on."""

from __future__ import annotations

import msgpack
import pytest

from shared.runtime.context import Context
from shared.runtime.intake import KEPT_BYTES, accept, accept_job
from shared.runtime.logs import Log
from shared.runtime.memory_bus import MemoryBus
from shared.wire.codec import decode, encode
from shared.wire.errors import ForeignMajor
from shared.wire.telemetry import BlobRef, DeadLetter

GOOD = encode(BlobRef(digest="d", num_bytes=1, num_chunks=1))
FOREIGN = msgpack.packb({"w": [9, 0], "t": "BlobRef", "b": {}})
OTHER_TYPE = encode(
    DeadLetter(service="x", origin="y", reason="z", payload=b"", num_bytes=0, dropped_at=0.0)
)


@pytest.fixture
def context(memory_bus: MemoryBus) -> Context:
    made = Context("env_agents", "e1", "i1", memory_bus, Log("env_agents"))
    made.health.set_ready()
    return made


async def letters(context: Context) -> list[DeadLetter]:
    state = await context.bus.stream_state("dead")
    records = [await context.bus.get("dead", seq) for seq in range(1, state.last_seq + 1)]
    return [decode(record.payload, DeadLetter) for record in records if record is not None]


async def test_a_readable_payload_is_returned_and_nothing_is_kept(context):
    assert await accept(context, "s", 1, GOOD, BlobRef) == decode(GOOD, BlobRef)
    assert await letters(context) == []


@pytest.mark.parametrize(
    ("payload", "word"),
    [(b"\xff\x00 garbage", "malformed"), (b"", "malformed"), (OTHER_TYPE, "unexpected_type")],
)
async def test_an_unreadable_payload_becomes_a_counted_dead_letter(context, payload, word):
    assert await accept(context, "lagwise.x.ticket.t1", 7, payload, BlobRef) is None
    [letter] = await letters(context)
    assert (letter.service, letter.origin, letter.origin_seq) == (
        "env_agents", "lagwise.x.ticket.t1", 7,
    )  # fmt: skip
    assert (letter.payload, letter.num_bytes) == (payload, len(payload))
    assert letter.reason
    assert context.counters["dead_letters"] == context.counters[f"dead_letters_{word}"] == 1
    assert context.health.ready


async def test_a_payload_delivered_again_is_kept_once(context):
    for _ in range(3):
        await accept(context, "s", 7, b"garbage", BlobRef)
    assert len(await letters(context)) == 1


async def test_only_the_head_of_a_huge_payload_is_kept(context):
    payload = b"\xc1" * (KEPT_BYTES + 5)
    await accept(context, "s", 7, payload, BlobRef)
    [letter] = await letters(context)
    assert (len(letter.payload), letter.num_bytes) == (KEPT_BYTES, KEPT_BYTES + 5)


async def test_a_foreign_major_is_raised_and_readiness_returns_with_the_next_readable(context):
    with pytest.raises(ForeignMajor):
        await accept(context, "s", 1, FOREIGN, BlobRef)
    assert "9.0" in context.health.reason
    assert await letters(context) == []
    await accept(context, "s", 2, GOOD, BlobRef)
    assert context.health.ready


async def test_a_readable_message_does_not_hide_another_reason_to_be_unready(context):
    context.health.set_unready("no weights yet")
    await accept(context, "s", 2, GOOD, BlobRef)
    assert context.health.reason == "no weights yet"


async def test_a_bad_job_is_terminated_and_the_next_one_is_served(context):
    bus = context.bus
    queue = await bus.work_queue("tickets", "env", ack_wait_s=0.05, max_ack_pending=10)
    await bus.append(bus.subjects.ticket("t1"), b"garbage")
    await bus.append(bus.subjects.ticket("t2"), GOOD)
    bad, good = await queue.next(2, 1)
    assert await accept_job(context, bad, BlobRef) is None
    assert await accept_job(context, good, BlobRef) is not None
    await good.ack()
    assert await queue.next(1, 0.2) == []
    assert await queue.pending() == (0, 0)


async def test_a_job_of_another_major_is_handed_back_not_buried(context, monkeypatch):
    monkeypatch.setattr("shared.runtime.intake.FOREIGN_DELAY_S", 0.05)
    bus = context.bus
    queue = await bus.work_queue("tickets", "env", ack_wait_s=60, max_ack_pending=10)
    await bus.append(bus.subjects.ticket("t1"), FOREIGN)
    [job] = await queue.next(1, 1)
    assert await accept_job(context, job, BlobRef) is None
    [job] = await queue.next(1, 5)
    assert job.num_delivered == 2
    assert await letters(context) == []
