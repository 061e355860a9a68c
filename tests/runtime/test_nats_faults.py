"""What the bus keeps while its server is killed, frozen, unreachable, full or refusing."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing

import pytest

from shared.runtime import nats_server as server_module
from shared.runtime.errors import BusUnavailable, Conflict, Denied, StreamFull
from shared.runtime.logs import Log
from shared.runtime.nats_bus import NatsBus, connect
from shared.runtime.sections import BusSection
from shared.wire.subjects import Subjects

Dial = Callable[..., Awaitable[NatsBus]]


@pytest.fixture
async def dial(mortal_nats_server, subjects: Subjects) -> AsyncIterator[Dial]:
    """Connects a client to the test's own server."""
    clients: list[NatsBus] = []

    async def connect_one(url: str = "", run: Subjects = subjects, **bounds: float) -> NatsBus:
        bounds = {"connect_timeout_s": 10, "request_timeout_s": 2, "retry_s": 20, **bounds}
        section = BusSection(url=url or mortal_nats_server.url, **bounds)
        client = await connect(section, run, "faults", Log("test"))
        clients.append(client)
        return client

    yield connect_one
    for client in clients:
        await client.close()


async def restart(server, down_s: float = 0.1) -> None:
    server.kill()
    await asyncio.sleep(down_s)
    await asyncio.to_thread(server.start)


async def eventually(condition, within_s: float = 20.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "condition not reached in time"
        await asyncio.sleep(0.02)


async def test_through_three_kills_no_acknowledged_append_is_lost_and_reading_has_no_gap(
    mortal_nats_server, dial
):
    writer, reader = await dial(), await dial()
    await writer.create_streams()
    acknowledged: dict[int, bytes] = {}
    read: list[tuple[int, bytes]] = []
    writing = True

    async def write(worker: int) -> None:
        count = 0
        while writing:
            payload = b"%d-%d" % (worker, count)
            subject = writer.subjects.terminal(payload.decode())
            seq = await writer.append(subject, payload, expect_last_subject_seq=0)
            assert seq not in acknowledged
            acknowledged[seq] = payload
            count += 1
            await asyncio.sleep(0.001)

    async def follow() -> None:
        async with aclosing(reader.read("terminals", 1)) as batches:
            async for batch in batches:
                read.extend((record.seq, record.payload) for record in batch)

    async with asyncio.TaskGroup() as group:
        writers = [group.create_task(write(worker)) for worker in range(4)]
        following = group.create_task(follow())
        for _ in range(3):
            before = len(acknowledged)
            await eventually(lambda before=before: len(acknowledged) > before + 50)
            await restart(mortal_nats_server)
        before = len(acknowledged)
        await eventually(lambda: len(acknowledged) > before + 50)
        writing = False
        await asyncio.wait(writers)
        await eventually(lambda: len(read) >= len(acknowledged))
        following.cancel()
    assert writer.counters["reconnects"] == 3
    assert read == sorted(acknowledged.items())
    assert [seq for seq, _ in read] == list(range(1, len(read) + 1))


async def test_through_two_kills_every_job_of_the_work_queue_is_finished(mortal_nats_server, dial):
    bus = await dial()
    await bus.create_streams()
    for i in range(300):
        await bus.append(bus.subjects.ticket(f"t{i}"), b"%d" % i)
    finished: set[str] = set()

    async def work() -> None:
        client = await dial()
        queue = await client.work_queue("tickets", "env", ack_wait_s=2.0, max_ack_pending=100)
        while len(finished) < 300:
            jobs = await queue.next(8, 0.5)
            await asyncio.sleep(0.08)
            await asyncio.gather(*(job.ack() for job in jobs))
            finished.update(job.record.subject for job in jobs)

    async with asyncio.timeout(40), asyncio.TaskGroup() as group:
        for _ in range(2):
            group.create_task(work())
        for target in (60, 160):
            await eventually(lambda target=target: len(finished) > target)
            await restart(mortal_nats_server)
    queue = await bus.work_queue("tickets", "env", ack_wait_s=2.0, max_ack_pending=100)
    assert await queue.pending() == (0, 0)


async def test_an_append_whose_acknowledgement_was_lost_returns_its_own_sequence(
    mortal_nats_server, dial
):
    bus = await dial(request_timeout_s=0.3)
    await bus.create_streams()
    mortal_nats_server.freeze()
    appending = asyncio.ensure_future(
        bus.append(bus.subjects.manifest, b"mine", expect_last_subject_seq=0)
    )
    await asyncio.sleep(1.0)  # at least two attempts lie in the server's socket
    mortal_nats_server.thaw()
    assert await appending == 1
    assert bus.counters["publish_retries"] >= 1
    assert (await bus.stream_state("manifests")).num_messages == 1
    with pytest.raises(Conflict):
        await bus.append(bus.subjects.manifest, b"mine", expect_last_subject_seq=0)


async def test_a_plain_append_whose_acknowledgement_was_lost_is_stored_once(
    mortal_nats_server, dial
):
    bus = await dial(request_timeout_s=0.3)
    await bus.create_streams()
    mortal_nats_server.freeze()
    appending = asyncio.ensure_future(bus.append(bus.subjects.stats("step"), b"x"))
    await asyncio.sleep(1.0)
    mortal_nats_server.thaw()
    await appending
    assert bus.counters["publish_retries"] >= 1
    assert (await bus.stream_state("stats")).num_messages == 1


async def test_an_append_in_flight_notices_the_lost_connection_before_its_timeout(
    mortal_nats_server, dial
):
    bus = await dial(request_timeout_s=30, retry_s=60)
    await bus.create_streams()
    mortal_nats_server.freeze()
    appending = asyncio.ensure_future(bus.append(bus.subjects.journal, b"x"))
    await asyncio.sleep(0.2)
    started = time.monotonic()
    await restart(mortal_nats_server)
    await appending
    assert time.monotonic() - started < 10


async def test_without_a_server_every_operation_fails_within_its_bound(mortal_nats_server, dial):
    bus = await dial(request_timeout_s=0.5, retry_s=1.0)
    await bus.create_streams()
    queue = await bus.work_queue("tickets", "env", ack_wait_s=5, max_ack_pending=10)
    await bus.append(bus.subjects.ticket("t"), b"x")
    [job] = await queue.next(1, 2)
    mortal_nats_server.kill()
    await eventually(lambda: not bus.connected)

    async def keep_pulling() -> None:
        while True:
            assert await queue.next(1, 0.3) == []

    async def read() -> None:
        async with aclosing(bus.read("journal", 1)) as batches:
            async for _ in batches:
                pass

    started = time.monotonic()
    outcomes = await asyncio.gather(
        bus.append(bus.subjects.journal, b"x"),
        bus.last(bus.subjects.journal),
        bus.get("journal", 1),
        bus.stream_state("journal"),
        bus.put_control("control", b"x"),
        bus.get_control("control"),
        queue.pending(),
        keep_pulling(),
        read(),
        job.ack(),
        return_exceptions=True,
    )
    assert [type(outcome) for outcome in outcomes] == [BusUnavailable] * len(outcomes)
    assert time.monotonic() - started < 5
    await bus.publish(bus.subjects.cancel("p"), b"dropped, never blocks")
    assert bus.counters["core_dropped"] == 1


async def test_core_subscriptions_and_inboxes_live_on_after_a_restart(mortal_nats_server, dial):
    asking, serving = await dial(), await dial()
    answers: list[bytes] = []

    async def answer(message) -> None:
        await serving.publish(message.reply, b"re: " + message.payload)

    async def note(message) -> None:
        answers.append(message.payload)

    await serving.subscribe(serving.subjects.sample("policy"), answer, queue="rollouts")
    inbox = asking.new_inbox()
    await asking.open_inbox(inbox, note)
    await restart(mortal_nats_server)
    await eventually(lambda: asking.connected and serving.connected)

    async def ask() -> None:
        while b"re: hello" not in answers:
            await asking.publish_request(asking.subjects.sample("policy"), b"hello", inbox)
            await asyncio.sleep(0.1)

    async with asyncio.timeout(10):
        await ask()


async def test_control_values_and_streams_outlive_a_kill(mortal_nats_server, dial):
    bus = await dial()
    await bus.create_streams()
    await bus.put_control("control", b"v7")
    await restart(mortal_nats_server)
    assert await bus.get_control("control") == b"v7"
    await bus.wait_for_streams(5)


async def test_an_unreachable_server_is_named_within_the_connect_bound(dial):
    url = f"nats://127.0.0.1:{server_module.free_port()}"
    started = time.monotonic()
    with pytest.raises(BusUnavailable, match=url):
        await dial(url=url, connect_timeout_s=0.6)
    assert time.monotonic() - started < 3


async def test_a_port_that_speaks_something_else_is_unreachable_too(dial):
    async def chat(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()
        await writer.wait_closed()

    async with await asyncio.start_server(chat, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(BusUnavailable, match=str(port)):
            await dial(url=f"nats://127.0.0.1:{port}", connect_timeout_s=0.6)


async def test_a_full_stream_is_a_fault_of_its_own_and_other_streams_go_on(dial):
    bus = await dial(max_stream_bytes=64 * 1024)
    await bus.create_streams()

    async def fill() -> None:
        for i in range(100):
            await bus.append(bus.subjects.terminal(f"t{i}"), bytes(4096))

    with pytest.raises(StreamFull, match="terminal"):
        await fill()
    await bus.append(bus.subjects.score("t0"), b"x")


async def test_a_changed_limit_takes_effect_on_existing_streams(dial):
    small = await dial(max_stream_bytes=16 * 1024)
    await small.create_streams()
    large = await dial(max_stream_bytes=1024 * 1024)
    await large.create_streams()
    for i in range(20):
        await large.append(large.subjects.terminal(f"t{i}"), bytes(4096))


PERMISSIONS = """
authorization { users: [
  { user: all, password: all }
  { user: few, password: few, permissions: {
      publish: { deny: ["lagwise.*.journal", "lagwise.*.cancel.>"] }
      subscribe: { deny: ["lagwise.*.lease.>"] } } }
] }
"""


@pytest.fixture
async def denied_bus(tmp_path, subjects) -> AsyncIterator[NatsBus]:
    """A client that may not write the journal, cancel, or listen to leases."""
    port = server_module.free_port()
    config = tmp_path / "nats.conf"
    server_module.write_config(config, port=port, store_dir=tmp_path / "js", extra=PERMISSIONS)
    process = server_module.start(config, tmp_path / "log")
    server_module.wait_healthy(f"nats://127.0.0.1:{port}", 20, process)
    clients = [
        await connect(
            BusSection(url=f"nats://{user}:{user}@127.0.0.1:{port}", request_timeout_s=5),
            subjects, user, Log("test"),
        )
        for user in ("all", "few")
    ]  # fmt: skip
    await clients[0].create_streams()
    yield clients[1]
    for client in clients:
        await client.close()
    process.terminate()
    process.wait(timeout=10)


async def test_a_denied_append_raises_at_once_and_says_so_loudly(denied_bus, caplog):
    started = time.monotonic()
    with caplog.at_level(logging.ERROR), pytest.raises(Denied, match="journal"):
        await denied_bus.append(denied_bus.subjects.journal, b"x")
    assert time.monotonic() - started < 2
    assert denied_bus.counters["denied"] == 1
    assert "bus_denied" in caplog.text
    assert await denied_bus.append(denied_bus.subjects.stats("step"), b"fine") == 1


async def test_a_denied_core_publish_is_counted_and_logged(denied_bus, caplog):
    with caplog.at_level(logging.ERROR):
        await denied_bus.publish(denied_bus.subjects.cancel("p"), b"x")
        await eventually(lambda: denied_bus.counters["denied"] == 1)
    assert "bus_denied" in caplog.text


async def test_a_denied_subscription_raises(denied_bus):
    async def ignore(_message) -> None:
        return None

    with pytest.raises(Denied, match="lease"):
        await denied_bus.subscribe(denied_bus.subjects.leases, ignore)
    await denied_bus.subscribe(denied_bus.subjects.sample("policy"), ignore)
