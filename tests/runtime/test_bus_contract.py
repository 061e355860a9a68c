"""One suite for every bus: MemoryBus and NatsBus keep the same promises."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing

import pytest

from shared.runtime.bus import Bus, CoreMessage, Record
from shared.runtime.errors import BusUnavailable, Conflict, PayloadTooLarge
from shared.wire.codec import content_digest
from shared.wire.subjects import StreamName


async def take(bus: Bus, stream: StreamName, start: int, count: int, **kw: str) -> list[Record]:
    records: list[Record] = []
    async with asyncio.timeout(15), aclosing(bus.read(stream, start, **kw)) as batches:
        async for batch in batches:
            assert batch, "a batch is never empty"
            records += batch
            if len(records) >= count:
                break
    return records


async def eventually(condition, within_s: float = 5.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "condition not reached in time"
        await asyncio.sleep(0.01)


# --- life cycle


async def test_creating_streams_twice_keeps_what_they_hold(bus, new_client):
    await bus.append(bus.subjects.journal, b"kept")
    other = await new_client()
    await other.create_streams()
    assert (await other.last(bus.subjects.journal)).payload == b"kept"


async def test_waiting_for_streams_nobody_creates_ends_with_a_line_naming_the_run(new_client):
    client = await new_client()
    with pytest.raises(BusUnavailable, match=client.subjects.run):
        await client.wait_for_streams(0.3)


async def test_waiting_for_streams_ends_when_somebody_creates_them(new_client):
    waiting, creating = await new_client(), await new_client()
    async with asyncio.TaskGroup() as group:
        waiter = group.create_task(waiting.wait_for_streams(10))
        await asyncio.sleep(0.1)
        await creating.create_streams()
    assert waiter.exception() is None


async def test_a_connected_bus_says_so_and_a_closed_one_does_not(bus):
    assert bus.connected
    await bus.close()
    assert not bus.connected


async def test_closing_is_bounded_and_may_be_repeated(bus):
    reading = bus.read("journal", 1)
    reader = asyncio.ensure_future(anext(reading))
    await asyncio.sleep(0.05)
    started = time.monotonic()
    await bus.close()
    await bus.close()
    assert time.monotonic() - started < 4
    reader.cancel()
    await asyncio.gather(reader, return_exceptions=True)
    await reading.aclose()


# --- core messages


async def test_a_published_message_reaches_every_subscriber_in_order(bus, new_client):
    other = await new_client()
    seen: dict[str, list[bytes]] = {"a": [], "b": []}
    for client, name in ((bus, "a"), (other, "b")):

        async def note(message: CoreMessage, name: str = name) -> None:
            seen[name].append(message.payload)

        await client.subscribe(bus.subjects.leases, note)
    payloads = [b"%d" % i for i in range(50)]
    for payload in payloads:
        await bus.publish(bus.subjects.lease("rollout", "p1"), payload)
    await eventually(lambda: seen["a"] == payloads and seen["b"] == payloads)


async def test_a_queue_group_gives_each_message_to_one_member(bus, new_client):
    seen: list[tuple[str, bytes]] = []
    for name in ("a", "b"):
        member = await new_client()

        async def note(message: CoreMessage, name: str = name) -> None:
            seen.append((name, message.payload))

        await member.subscribe(bus.subjects.sample("policy"), note, queue="rollouts")
    for i in range(200):
        await bus.publish(bus.subjects.sample("policy"), b"%d" % i)
    await eventually(lambda: len(seen) >= 200)
    await asyncio.sleep(0.05)
    assert sorted(int(payload) for _, payload in seen) == list(range(200))
    assert {name for name, _ in seen} == {"a", "b"}


async def test_an_exception_in_a_handler_is_counted_and_the_next_message_still_arrives(bus):
    seen: list[bytes] = []

    async def handle(message: CoreMessage) -> None:
        seen.append(message.payload)
        if message.payload == b"bad":
            raise RuntimeError("handler")

    await bus.subscribe(bus.subjects.cancel("p1"), handle)
    for payload in (b"bad", b"good"):
        await bus.publish(bus.subjects.cancel("p1"), payload)
    await eventually(lambda: seen == [b"bad", b"good"])
    assert bus.counters["handler_errors"] == 1


async def test_a_closed_subscription_hears_nothing_more(bus):
    seen: list[bytes] = []

    async def note(message: CoreMessage) -> None:
        seen.append(message.payload)

    subscription = await bus.subscribe(bus.subjects.cancel("p1"), note)
    await bus.publish(bus.subjects.cancel("p1"), b"1")
    await eventually(lambda: seen == [b"1"])
    await subscription.close()
    await bus.publish(bus.subjects.cancel("p1"), b"2")
    await asyncio.sleep(0.1)
    assert seen == [b"1"]


async def test_several_replies_reach_the_inbox_that_asked_in_order(bus, new_client):
    server = await new_client()

    async def answer(message: CoreMessage) -> None:
        for part in (b"accepted ", b"done "):
            await server.publish(message.reply, part + message.payload)

    await server.subscribe(bus.subjects.sample("policy"), answer, queue="rollouts")
    replies: dict[bytes, list[bytes]] = {}
    inboxes = []
    for name in (b"x", b"y"):
        inbox = bus.new_inbox()
        replies[name] = []

        async def note(message: CoreMessage, name: bytes = name) -> None:
            replies[name].append(message.payload)

        inboxes.append(await bus.open_inbox(inbox, note))
        await bus.publish_request(bus.subjects.sample("policy"), name, inbox)
    await eventually(lambda: all(len(got) == 2 for got in replies.values()))
    assert replies == {b"x": [b"accepted x", b"done x"], b"y": [b"accepted y", b"done y"]}
    for inbox in inboxes:
        await inbox.close()


async def test_a_closed_inbox_hears_nothing_and_a_failing_one_does_not_harm_others(bus):
    seen: list[bytes] = []

    async def fail(message: CoreMessage) -> None:
        raise RuntimeError("inbox")

    async def note(message: CoreMessage) -> None:
        seen.append(message.payload)

    failing, closed, fine = bus.new_inbox(), bus.new_inbox(), bus.new_inbox()
    await bus.open_inbox(failing, fail)
    await (await bus.open_inbox(closed, note)).close()
    await bus.open_inbox(fine, note)
    for inbox in (failing, closed, fine):
        await bus.publish(inbox, inbox.encode())
    await eventually(lambda: seen == [fine.encode()])


async def test_a_request_nobody_serves_is_answered_with_an_empty_payload(bus):
    seen: list[bytes] = []

    async def note(message: CoreMessage) -> None:
        seen.append(message.payload)

    inbox = bus.new_inbox()
    await bus.open_inbox(inbox, note)
    await bus.publish_request(bus.subjects.sample("policy"), b"anyone?", inbox)
    await eventually(lambda: seen == [b""])


async def test_a_core_message_above_the_limit_is_refused_by_name(bus):
    with pytest.raises(PayloadTooLarge, match=r"sample\.policy"):
        await bus.publish(bus.subjects.sample("policy"), bytes(bus.max_payload + 1))


# --- logs


async def test_sequences_start_at_one_and_grow_by_one(bus):
    seqs = [await bus.append(bus.subjects.terminal(f"t{i}"), b"x") for i in range(3)]
    assert seqs == [1, 2, 3]


async def test_the_first_writer_of_a_subject_wins(bus, new_client):
    other = await new_client()
    subject = bus.subjects.terminal("t1")
    assert await bus.append(subject, b"mine", expect_last_subject_seq=0) == 1
    with pytest.raises(Conflict) as caught:
        await other.append(subject, b"yours", expect_last_subject_seq=0)
    assert (caught.value.subject, caught.value.expected) == (subject, 0)
    assert (await other.last(subject)).payload == b"mine"


async def test_compare_and_set_follows_the_subject_not_the_stream(bus):
    first = await bus.append(bus.subjects.terminal("t1"), b"1")
    await bus.append(bus.subjects.terminal("t2"), b"2")
    third = await bus.append(bus.subjects.terminal("t1"), b"3", expect_last_subject_seq=first)
    assert third == 3


async def test_of_many_concurrent_writers_exactly_one_wins(bus, new_client):
    clients = [bus, await new_client(), await new_client()]

    async def write(client: Bus, payload: bytes) -> bool:
        try:
            await client.append(bus.subjects.manifest, payload, expect_last_subject_seq=0)
        except Conflict:
            return False
        return True

    wins = await asyncio.gather(
        *(write(client, b"%d-%d" % (i, k)) for i, client in enumerate(clients) for k in range(5))
    )
    assert sum(wins) == 1
    assert (await bus.stream_state("manifests")).num_messages == 1


async def test_a_repeated_message_id_stores_once(bus, new_client):
    other = await new_client()
    first = await bus.append(bus.subjects.stats("step"), b"x", msg_id="step-1")
    again = await other.append(bus.subjects.stats("step"), b"x", msg_id="step-1")
    assert again == first
    assert (await bus.stream_state("stats")).num_messages == 1


async def test_a_conflict_is_told_apart_from_an_own_repetition_by_reading_back(bus):
    subject = bus.subjects.manifest
    await bus.append(subject, b"upload-a", expect_last_subject_seq=0)
    with pytest.raises(Conflict):
        await bus.append(subject, b"upload-a", expect_last_subject_seq=0)
    assert (await bus.last(subject)).payload == b"upload-a"


async def test_what_was_appended_is_read_back_by_subject_and_by_sequence(bus):
    before = time.time()
    await bus.append(bus.subjects.journal, b"1")
    seq = await bus.append(bus.subjects.journal, b"2")
    last = await bus.last(bus.subjects.journal)
    assert last == await bus.get("journal", seq)
    assert (last.seq, last.subject, last.payload) == (seq, bus.subjects.journal, b"2")
    assert before - 1 <= last.stored_at <= time.time() + 1


async def test_what_does_not_exist_is_none(bus):
    assert await bus.last(bus.subjects.manifest) is None
    assert await bus.get("journal", 7) is None
    assert await bus.get_control("control") is None


async def test_a_subject_of_no_stream_is_the_callers_error(bus):
    with pytest.raises(ValueError, match="no stream"):
        await bus.append(bus.subjects.leases, b"x")


async def test_reading_yields_everything_in_order_and_goes_on_with_what_arrives(bus, new_client):
    writer = await new_client()
    for i in range(1200):  # more than one batch
        await writer.append(bus.subjects.terminal(f"a{i}"), b"%d" % i)
    got: list[Record] = []
    async with asyncio.timeout(20), aclosing(bus.read("terminals", 1)) as batches:
        async for batch in batches:
            got += batch
            if len(got) == 1200:
                await writer.append(bus.subjects.terminal("late"), b"1200")
            if len(got) == 1201:
                break
    assert [record.seq for record in got] == list(range(1, 1202))
    assert [int(record.payload) for record in got] == list(range(1201))


async def test_reading_starts_at_any_position_also_beyond_the_end(bus):
    for i in range(1, 6):
        await bus.append(bus.subjects.journal, b"%d" % i)
    assert [r.seq for r in await take(bus, "journal", 4, 2)] == [4, 5]
    reading = asyncio.ensure_future(take(bus, "journal", 7, 1))
    await asyncio.sleep(0.1)
    await bus.append(bus.subjects.journal, b"6")
    await bus.append(bus.subjects.journal, b"7")
    assert [r.payload for r in await reading] == [b"7"]


async def test_positions_zero_and_one_both_mean_the_beginning(bus):
    await bus.append(bus.subjects.journal, b"1")
    assert [r.seq for r in await take(bus, "journal", 0, 1)] == [1]


async def test_sequences_purged_before_they_were_read_are_skipped(bus):
    for i in range(1, 11):
        await bus.append(bus.subjects.journal, b"%d" % i)
    await bus.purge("journal", 6)
    assert [r.seq for r in await take(bus, "journal", 3, 5)] == [6, 7, 8, 9, 10]
    state = await bus.stream_state("journal")
    assert (state.first_seq, state.last_seq, state.num_messages) == (6, 10, 5)


async def test_a_purge_below_the_first_sequence_deletes_nothing(bus):
    for _ in range(3):
        await bus.append(bus.subjects.journal, b"x")
    await bus.purge("journal", 0)
    await bus.purge("journal", 1)
    assert (await bus.stream_state("journal")).num_messages == 3


async def test_a_purge_of_one_subject_leaves_the_others(bus):
    for name in ("a", "b", "a", "b"):
        await bus.append(bus.subjects.chunk(name, 0), b"x")
    prefix = bus.subjects.prefix
    await bus.purge("chunks", 4, subject=f"{prefix}.chunk.a.*")
    assert [r.seq for r in await take(bus, "chunks", 1, 2)] == [2, 4]


async def test_a_purged_subject_can_be_written_first_again(bus):
    subject = bus.subjects.terminal("t1")
    seq = await bus.append(subject, b"old", expect_last_subject_seq=0)
    await bus.purge("terminals", seq + 1)
    assert await bus.append(subject, b"new", expect_last_subject_seq=0) == seq + 1


async def test_a_filter_reads_only_its_subjects_in_order(bus):
    for i in range(6):
        await bus.append(bus.subjects.chunk("a" if i % 2 else "b", i), b"%d" % i)
    wanted = f"{bus.subjects.prefix}.chunk.a.*"
    assert [r.seq for r in await take(bus, "chunks", 1, 3, subject=wanted)] == [2, 4, 6]


async def test_two_readers_of_one_client_do_not_disturb_each_other(bus):
    for i in range(20):
        await bus.append(bus.subjects.journal, b"%d" % i)
    one, two = await asyncio.gather(take(bus, "journal", 1, 20), take(bus, "journal", 11, 10))
    assert [r.seq for r in one] == list(range(1, 21))
    assert [r.seq for r in two] == list(range(11, 21))


async def test_the_state_of_a_stream_counts_messages_and_bytes(bus):
    empty = await bus.stream_state("scores")
    assert (empty.last_seq, empty.num_messages, empty.num_bytes) == (0, 0, 0)
    await bus.append(bus.subjects.score("t1"), bytes(1000))
    state = await bus.stream_state("scores")
    assert (state.first_seq, state.last_seq, state.num_messages) == (1, 1, 1)
    assert state.num_bytes >= 1000


async def test_subjects_are_listed_once_while_they_hold_a_message_and_match(bus):
    subjects = bus.subjects
    for name, index in (("a", 0), ("a", 1), ("b", 0), ("a", 0), ("c", 7)):
        await bus.append(subjects.chunk(name, index), b"x")
    everything = f"{subjects.prefix}.chunk.*.*"
    listed = await bus.subjects_of("chunks", everything)
    assert listed == [subjects.chunk(n, i) for n, i in (("a", 0), ("a", 1), ("b", 0), ("c", 7))]
    assert await bus.subjects_of("chunks", f"{subjects.prefix}.chunk.*.0") == [
        subjects.chunk("a", 0),
        subjects.chunk("b", 0),
    ]
    assert await bus.subjects_of("chunks", subjects.chunk("c", 7)) == [subjects.chunk("c", 7)]
    assert await bus.subjects_of("chunks", f"{subjects.prefix}.chunk.d.*") == []
    await bus.purge("chunks", 4)
    assert await bus.subjects_of("chunks", everything) == [
        subjects.chunk("a", 0),
        subjects.chunk("c", 7),
    ]


async def test_an_empty_stream_lists_no_subjects(bus):
    assert await bus.subjects_of("scores", f"{bus.subjects.prefix}.score.*") == []


# --- blobs


@pytest.mark.parametrize("factor", [0.51, 1.7])
async def test_a_payload_above_half_of_the_limit_arrives_whole_by_every_way(bus, factor):
    payload = bytes(range(256)) * int(bus.max_payload * factor / 256)
    seq = await bus.append(bus.subjects.terminal("big"), payload, expect_last_subject_seq=0)
    assert (await bus.last(bus.subjects.terminal("big"))).payload == payload
    assert (await bus.get("terminals", seq)).payload == payload
    [record] = await take(bus, "terminals", 1, 1)
    assert record.payload == payload
    assert (await bus.stream_state("terminals")).num_bytes < 1000


async def test_the_same_large_payload_is_kept_once(bus):
    payload = bytes(bus.max_payload)
    for name in ("a", "b"):
        await bus.append(bus.subjects.terminal(name), payload)
    assert (await bus.stream_state("blobs")).num_messages == 2


async def test_who_points_at_a_blob_is_told_without_fetching_it(bus):
    payload = bytes(bus.max_payload)
    large = await bus.append(bus.subjects.terminal("large"), payload)
    small = await bus.append(bus.subjects.terminal("small"), b"x")
    assert await bus.blob_of("terminals", large) == content_digest(payload)
    assert await bus.blob_of("terminals", small) is None
    assert await bus.blob_of("terminals", small + 1) is None


async def test_a_large_job_reaches_the_worker_whole(bus):
    payload = b"j" * (bus.max_payload // 2 + 1)
    await bus.append(bus.subjects.ticket("t1"), payload)
    queue = await bus.work_queue("tickets", "env_agents", ack_wait_s=5, max_ack_pending=10)
    [job] = await queue.next(1, 5)
    assert job.record.payload == payload


async def test_a_pointer_whose_chunks_are_gone_is_handed_on_as_it_is_and_counted(bus):
    await bus.append(bus.subjects.terminal("big"), bytes(bus.max_payload))
    await bus.purge("blobs", 10**9)
    record = await bus.last(bus.subjects.terminal("big"))
    assert b"BlobRef" in record.payload
    assert bus.counters["blobs_missing"] == 1


# --- work queue


async def join(bus: Bus, ack_wait_s: float = 20.0, max_ack_pending: int = 100):
    return await bus.work_queue(
        "tickets", "env_agents", ack_wait_s=ack_wait_s, max_ack_pending=max_ack_pending
    )


async def issue(bus: Bus, count: int, start: int = 0) -> None:
    for i in range(start, start + count):
        await bus.append(bus.subjects.ticket(f"t{i}"), b"%d" % i, expect_last_subject_seq=0)


async def test_a_waiting_job_is_handed_out_at_once_and_never_more_than_asked_for(bus):
    await issue(bus, 5)
    queue = await join(bus)
    started = time.monotonic()
    jobs = await queue.next(3, 5)
    assert [job.record.payload for job in jobs] == [b"0", b"1", b"2"]
    assert [job.num_delivered for job in jobs] == [1, 1, 1]
    assert time.monotonic() - started < 2
    assert await queue.pending() == (2, 3)


async def test_no_job_within_the_timeout_is_an_empty_list_in_time(bus):
    queue = await join(bus)
    started = time.monotonic()
    assert await queue.next(3, 0.3) == []
    assert 0.2 < time.monotonic() - started < 2


async def test_a_job_that_arrives_while_waiting_ends_the_wait(bus):
    queue = await join(bus)
    waiting = asyncio.ensure_future(queue.next(4, 10))
    await asyncio.sleep(0.2)
    started = time.monotonic()
    await issue(bus, 1)
    assert [job.record.payload for job in await waiting] == [b"0"]
    assert time.monotonic() - started < 2


async def test_each_job_goes_to_one_of_several_workers(bus, new_client):
    await issue(bus, 40)
    queues = [await join(bus), await join(await new_client())]
    seen: list[bytes] = []

    async def work(queue) -> None:
        while jobs := await queue.next(3, 0.5):
            seen.extend(job.record.payload for job in jobs)
            for job in jobs:
                await job.ack()

    await asyncio.gather(*(work(queue) for queue in queues))
    assert sorted(map(int, seen)) == list(range(40))
    assert await queues[0].pending() == (0, 0)


async def test_an_acknowledged_job_leaves_the_queue_and_frees_its_subject(bus):
    await issue(bus, 1)
    queue = await join(bus)
    with pytest.raises(Conflict):
        await bus.append(bus.subjects.ticket("t0"), b"again", expect_last_subject_seq=0)
    [job] = await queue.next(1, 5)
    with pytest.raises(Conflict):
        await bus.append(bus.subjects.ticket("t0"), b"again", expect_last_subject_seq=0)
    await job.ack()
    await job.ack()  # a repeated acknowledgement is harmless
    assert (await bus.stream_state("tickets")).num_messages == 0
    # The fence does not outlive the job: who re-publishes must ask the terminals first.
    assert await bus.append(bus.subjects.ticket("t0"), b"again", expect_last_subject_seq=0) == 2


async def test_an_unfinished_job_is_delivered_again_with_a_higher_count(bus):
    await issue(bus, 1)
    queue = await join(bus, ack_wait_s=0.4)
    await queue.next(1, 5)
    [again] = await queue.next(1, 5)
    assert (again.record.payload, again.num_delivered) == (b"0", 2)
    assert bus.counters["redeliveries"] == 1
    await again.ack()


async def test_a_job_in_progress_is_not_delivered_again(bus):
    await issue(bus, 1)
    queue = await join(bus, ack_wait_s=0.6)
    [job] = await queue.next(1, 5)
    for _ in range(5):
        await asyncio.sleep(0.25)
        await job.in_progress()
    assert await queue.next(1, 0.1) == []
    await job.ack()


async def test_a_job_handed_back_is_delivered_again_at_once_or_after_its_delay(bus):
    await issue(bus, 1)
    queue = await join(bus)
    [job] = await queue.next(1, 5)
    await job.nak()
    [job] = await queue.next(1, 5)
    assert job.num_delivered == 2
    started = time.monotonic()
    await job.nak(0.6)
    [job] = await queue.next(1, 5)
    assert job.num_delivered == 3
    assert 0.4 < time.monotonic() - started < 4
    await job.ack()


async def test_a_terminated_job_is_never_delivered_again(bus):
    await issue(bus, 1)
    queue = await join(bus, ack_wait_s=0.3)
    [job] = await queue.next(1, 5)
    await job.term()
    assert await queue.next(1, 0.8) == []
    assert await queue.pending() == (0, 0)


async def test_no_more_jobs_are_in_flight_than_allowed(bus):
    await issue(bus, 5)
    queue = await join(bus, max_ack_pending=2)
    jobs = await queue.next(5, 5)
    assert len(jobs) == 2
    assert await queue.next(5, 0.2) == []
    await jobs[0].ack()
    assert [job.record.payload for job in await queue.next(5, 5)] == [b"2"]


async def test_a_worker_that_leaves_does_not_take_jobs_with_it(bus, new_client):
    leaving = await join(await new_client())
    assert await leaving.next(2, 0.1) == []
    await leaving.close()
    staying = await join(bus)
    await issue(bus, 2)
    got: list[bytes] = []
    while len(got) < 2:
        jobs = await staying.next(2, 5)
        assert jobs, "a job was swallowed"
        got += [job.record.payload for job in jobs]
    assert sorted(got) == [b"0", b"1"]


async def test_a_work_queue_over_a_log_leaves_the_log_whole(bus, new_client):
    for i in range(4):
        await bus.append(bus.subjects.terminal(f"t{i}"), b"%d" % i)
    queue = await bus.work_queue("terminals", "oracle", ack_wait_s=20, max_ack_pending=100)
    jobs = await queue.next(3, 5)
    for job in jobs:
        await job.ack()
    other = await new_client()
    again = await other.work_queue("terminals", "oracle", ack_wait_s=20, max_ack_pending=100)
    assert [job.record.payload for job in await again.next(3, 5)] == [b"3"]
    assert [r.seq for r in await take(bus, "terminals", 1, 4)] == [1, 2, 3, 4]


# --- control bucket


async def test_the_control_bucket_keeps_the_latest_value(bus, new_client):
    for i in range(3):
        await bus.put_control("control", b"%d" % i)
    await bus.put_control("other", b"x")
    other = await new_client()
    assert await other.get_control("control") == b"2"
    assert await other.get_control("other") == b"x"
