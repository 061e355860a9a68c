"""The bus inside one process: same contract as NatsBus, for tests and single-process runs."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import Counter, deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import replace

from shared.runtime import blobs
from shared.runtime.bus import CoreMessage, Record, StreamState, Subscription, WorkQueue
from shared.runtime.errors import BusUnavailable, Conflict, PayloadTooLarge
from shared.runtime.logs import Log
from shared.runtime.memory_queue import MemoryWorkQueue
from shared.runtime.memory_server import MemoryConsumer, MemoryServer, MemoryStream
from shared.runtime.streams import matches, stream_of
from shared.wire.subjects import STREAMS, StreamName, Subjects

Handler = Callable[[CoreMessage], Awaitable[None]]

MAX_BATCH = 512
"""Records of one yielded batch of `read`."""


class MemoryBus:
    """One client of a `MemoryServer`; give several clients the same server."""

    def __init__(
        self,
        subjects: Subjects,
        server: MemoryServer | None = None,
        *,
        name: str = "memory",
        log: Log | None = None,
        retry_s: float = 5.0,
    ) -> None:
        self.subjects = subjects
        self.server = server or MemoryServer()
        self.max_payload = self.server.max_payload
        self.counters: Counter[str] = Counter()
        self._log = log or Log("bus", name)
        self._retry_s = retry_s
        self._inbox_prefix = f"_INBOX.{name}.{uuid.uuid4().hex[:12]}"
        self._num_inboxes = 0
        self._pumps: set[_Pump] = set()
        self._closed = False

    @property
    def connected(self) -> bool:
        return self.server.up and not self._closed

    # --- life cycle
    async def create_streams(self) -> None:
        for spec in STREAMS:
            self.server.create_stream(self.subjects.stream(spec.name), spec.retention)
        self.server.buckets.setdefault(self.subjects.control_bucket, {})

    async def wait_for_streams(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while self.subjects.control_bucket not in self.server.buckets:
            if time.monotonic() >= deadline:
                raise BusUnavailable(
                    f"the streams of run {self.subjects.run!r} do not exist after {timeout_s:g} s: "
                    "is the learner running?"
                )
            await asyncio.sleep(0.01)

    async def close(self) -> None:
        self._closed = True
        for pump in list(self._pumps):
            await pump.close()

    # --- core
    async def publish(self, subject: str, payload: bytes) -> None:
        self._check_size(subject, payload)
        self.server.publish(subject, payload)

    async def subscribe(self, subject: str, handler: Handler, *, queue: str = "") -> Subscription:
        return _Pump(self, subject, queue, handler)

    def new_inbox(self) -> str:
        self._num_inboxes += 1
        return f"{self._inbox_prefix}.{self._num_inboxes}"

    async def open_inbox(self, inbox: str, handler: Handler) -> Subscription:
        return _Pump(self, inbox, "", handler)

    async def publish_request(self, subject: str, payload: bytes, reply: str) -> None:
        self._check_size(subject, payload)
        self.server.publish(subject, payload, reply)

    # --- logs
    async def append(
        self,
        subject: str,
        payload: bytes,
        *,
        expect_last_subject_seq: int | None = None,
        msg_id: str | None = None,
    ) -> int:
        if blobs.needs_blob(payload, self.max_payload):
            payload = await blobs.store(
                payload,
                self.subjects,
                self.max_payload,
                lambda name, chunk, chunk_id: self._append(name, chunk, None, chunk_id),
            )
        return await self._append(subject, payload, expect_last_subject_seq, msg_id)

    async def _append(
        self, subject: str, payload: bytes, expected: int | None, msg_id: str | None
    ) -> int:
        name = stream_of(self.subjects, subject)
        msg_id = msg_id or uuid.uuid4().hex
        retried = False
        while True:
            stream = await self._stream(name)
            try:
                seq = self.server.append(
                    self.subjects.stream(name), subject, payload, expected, msg_id
                )
            except Conflict:
                stored = stream.by_subject.get(subject)
                if (
                    retried
                    and stored is not None
                    and stream.msg_ids.get(msg_id, (0, 0.0))[0] == stored
                ):
                    return stored  # ours: only the acknowledgement was lost
                raise
            if not self.server.lose_acks:
                return seq
            self.server.lose_acks -= 1
            self.counters["publish_retries"] += 1
            retried = True
            await asyncio.sleep(0)

    async def last(self, subject: str) -> Record | None:
        stream = await self._stream(stream_of(self.subjects, subject))
        seq = stream.by_subject.get(subject)
        return None if seq is None else await self._resolved(stream.records[seq])

    async def get(self, stream: StreamName, seq: int) -> Record | None:
        record = (await self._stream(stream)).records.get(seq)
        return None if record is None else await self._resolved(record)

    async def blob_of(self, stream: StreamName, seq: int) -> str | None:
        record = (await self._stream(stream)).records.get(seq)
        ref = None if record is None else blobs.ref_of(record.payload)
        return None if ref is None else ref.digest

    async def read(
        self, stream: StreamName, start_seq: int, *, subject: str | None = None
    ) -> AsyncGenerator[list[Record], None]:
        position = start_seq
        while True:
            state = await self._stream(stream)
            batch: list[Record] = []
            for record in state.since(position):
                position = record.seq + 1
                if subject is None or matches(subject, record.subject):
                    batch.append(record)
                    if len(batch) == MAX_BATCH:
                        break
            if batch:
                yield [await self._resolved(record) for record in batch]
            else:
                await state.changed.wait(None)

    async def stream_state(self, stream: StreamName) -> StreamState:
        state = await self._stream(stream)
        return StreamState(state.first_seq, state.last_seq, len(state.records), state.num_bytes)

    async def subjects_of(self, stream: StreamName, pattern: str) -> list[str]:
        state = await self._stream(stream)
        held = {record.subject for record in state.records.values()}
        return sorted(subject for subject in held if matches(pattern, subject))

    async def purge(
        self, stream: StreamName, below_seq: int, *, subject: str | None = None
    ) -> None:
        await self._stream(stream)
        self.server.purge(self.subjects.stream(stream), below_seq, subject)

    # --- work queue
    async def work_queue(
        self, stream: StreamName, durable: str, *, ack_wait_s: float, max_ack_pending: int
    ) -> WorkQueue:
        state = await self._stream(stream)
        consumer = state.consumers.setdefault(durable, MemoryConsumer(ack_wait_s, max_ack_pending))
        consumer.ack_wait_s, consumer.max_ack_pending = ack_wait_s, max_ack_pending
        return MemoryWorkQueue(self, state, consumer)

    # --- control bucket
    async def put_control(self, key: str, payload: bytes) -> None:
        await self._until_up()
        self._check_size(key, payload)
        self.server.buckets[self.subjects.control_bucket][key] = payload

    async def get_control(self, key: str) -> bytes | None:
        await self._until_up()
        return self.server.buckets[self.subjects.control_bucket].get(key)

    # --- inside
    async def until_up(self) -> None:
        """Wait for the server within the retry bound."""
        await self._until_up()

    async def resolved(self, record: Record) -> Record:
        """Return the record with a blob pointer replaced by what it stands for."""
        return await self._resolved(record)

    def failed(self, subject: str, error: Exception) -> None:
        """Count and log what a handler raised."""
        self.counters["handler_errors"] += 1
        self._log.error("handler_failed", subject=subject, error=repr(error))

    def pumps(self) -> set[_Pump]:
        return self._pumps

    async def _until_up(self) -> None:
        deadline = time.monotonic() + self._retry_s
        while not self.connected:
            left = deadline - time.monotonic()
            if left <= 0 or self._closed:
                raise BusUnavailable(f"no bus for {self._retry_s:g} s")
            await self.server.up_changed.wait(left)

    async def _stream(self, name: StreamName) -> MemoryStream:
        await self._until_up()
        stream = self.server.streams.get(self.subjects.stream(name))
        if stream is None:
            raise BusUnavailable(
                f"stream {self.subjects.stream(name)} does not exist: call create_streams first"
            )
        return stream

    async def _resolved(self, record: Record) -> Record:
        if not blobs.is_ref(record.payload):
            return record
        payload = await blobs.resolve(record.payload, self.subjects, self._fetch_chunk)
        if payload is None:
            self.counters["blobs_missing"] += 1
            self._log.error("blob_missing", subject=record.subject, seq=record.seq)
            return record
        return replace(record, payload=payload)

    async def _fetch_chunk(self, subject: str) -> bytes | None:
        stream = await self._stream("blobs")
        seq = stream.by_subject.get(subject)
        return None if seq is None else stream.records[seq].payload

    def _check_size(self, subject: str, payload: bytes) -> None:
        if len(payload) > self.max_payload:
            raise PayloadTooLarge(subject, len(payload), self.max_payload)


class _Pump:
    """A subscription: calls its handler one message after another, in a task of its own."""

    def __init__(self, bus: MemoryBus, subject: str, queue: str, handler: Handler) -> None:
        self._bus = bus
        self._subject = subject
        self._handler = handler
        self._queue: deque[CoreMessage] = deque()
        self._wake = asyncio.Event()
        self._unsubscribe = bus.server.subscribe(subject, queue, self._deliver)
        self._task = asyncio.get_running_loop().create_task(self._run())
        bus.pumps().add(self)

    def _deliver(self, message: CoreMessage) -> None:
        self._queue.append(message)
        self._wake.set()

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._queue:
                try:
                    await self._handler(self._queue.popleft())
                except Exception as error:  # noqa: BLE001 - a handler never ends a subscription
                    self._bus.failed(self._subject, error)

    async def close(self) -> None:
        if self not in self._bus.pumps():
            return
        self._bus.pumps().discard(self)
        self._unsubscribe()
        if self._task is asyncio.current_task():
            self._queue.clear()  # closed from inside its own handler: nothing further is called
        self._task.cancel()
        if self._task is not asyncio.current_task():
            await asyncio.gather(self._task, return_exceptions=True)
