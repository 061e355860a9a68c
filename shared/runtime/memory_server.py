"""The in-process stand-in for a nats-server: streams, work queues, subscriptions, buckets.

Synchronous state without a task of its own; several `MemoryBus` clients share one. Knobs inject
the faults that clients must survive.
"""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice

from shared.runtime.bus import CoreMessage, Record
from shared.runtime.errors import Conflict, PayloadTooLarge, StreamFull
from shared.runtime.jetstream import DUPLICATE_WINDOW_S
from shared.runtime.streams import matches

Clock = Callable[[], float]
Deliver = Callable[[CoreMessage], None]


class Changed:
    """Wakes whoever waits for a state change."""

    def __init__(self) -> None:
        self._waiters: set[asyncio.Future[None]] = set()

    def notify(self) -> None:
        waiters, self._waiters = self._waiters, set()
        for waiter in waiters:
            if not waiter.done() and not waiter.get_loop().is_closed():
                waiter.set_result(None)

    async def wait(self, timeout_s: float | None) -> None:
        """Return at the next change, or after `timeout_s`."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        try:
            async with asyncio.timeout(timeout_s):
                await waiter
        except TimeoutError:
            return
        finally:
            self._waiters.discard(waiter)


@dataclass
class Pending:
    """A delivered job nobody has finished yet."""

    due: float
    """Monotonic time of its redelivery."""
    num_delivered: int


@dataclass
class MemoryConsumer:
    """A durable consumer of a work queue."""

    ack_wait_s: float
    max_ack_pending: int
    position: int = 1
    """Next sequence never delivered."""
    pending: dict[int, Pending] = field(default_factory=dict[int, Pending])


@dataclass
class MemoryStream:
    """One stream: records by sequence, newest sequence by subject."""

    retention: str
    max_bytes: int
    records: dict[int, Record] = field(default_factory=dict[int, Record])
    order: list[int] = field(default_factory=list[int])
    by_subject: dict[str, int] = field(default_factory=dict[str, int])
    msg_ids: dict[str, tuple[int, float]] = field(default_factory=dict[str, tuple[int, float]])
    """Message id -> its sequence, and when it came."""
    consumers: dict[str, MemoryConsumer] = field(default_factory=dict[str, MemoryConsumer])
    last_seq: int = 0
    num_bytes: int = 0
    changed: Changed = field(default_factory=Changed)

    @property
    def first_seq(self) -> int:
        return self.order[0] if self.order else self.last_seq + 1

    def since(self, seq: int) -> Iterator[Record]:
        """Records from `seq` on, in order."""
        start = bisect_left(self.order, seq)
        return (self.records[s] for s in islice(self.order, start, None))

    def add(self, record: Record) -> None:
        """Append a record that comes after all others, and wake whoever waits for it."""
        self.last_seq = record.seq
        self.records[record.seq] = record
        self.order.append(record.seq)
        self.by_subject[record.subject] = record.seq
        self.num_bytes += len(record.payload)
        self.changed.notify()

    def remove(self, seq: int) -> None:
        record = self.records.pop(seq, None)
        if record is None:
            return
        del self.order[bisect_left(self.order, seq)]
        self.num_bytes -= len(record.payload)
        if self.by_subject.get(record.subject) == seq:
            del self.by_subject[record.subject]


@dataclass
class _Interest:
    pattern: str
    queue: str
    deliver: Deliver


class MemoryServer:
    """What several MemoryBus clients connect to."""

    def __init__(
        self,
        *,
        max_payload: int = 8 * 1024 * 1024,
        max_stream_bytes: int = 4 * 1024**3,
        clock: Clock = time.time,
        monotonic: Clock = time.monotonic,
    ) -> None:
        self.max_payload = max_payload
        self.max_stream_bytes = max_stream_bytes
        self.clock = clock
        self.monotonic = monotonic
        self.streams: dict[str, MemoryStream] = {}
        self.buckets: dict[str, dict[str, bytes]] = {}
        self.up = True
        """False: nobody is connected. Change it with `set_up`."""
        self.up_changed = Changed()
        self.lose_acks = 0
        """So many next appends are stored but their acknowledgement is lost."""
        self._interests: list[_Interest] = []
        self._inboxes: dict[str, _Interest] = {}
        self._turn = 0

    def set_up(self, up: bool) -> None:
        """Bring the server down or up; what is stored stays."""
        self.up = up
        self.up_changed.notify()
        for stream in self.streams.values():
            stream.changed.notify()

    # --- streams
    def create_stream(self, name: str, retention: str) -> None:
        self.streams.setdefault(name, MemoryStream(retention, self.max_stream_bytes))

    def append(
        self, stream_name: str, subject: str, payload: bytes, expected: int | None, msg_id: str
    ) -> int:
        """Store one message, or return the sequence that `msg_id` already has.

        Raises:
            Conflict, StreamFull, PayloadTooLarge: as the server would refuse.
        """
        stream = self.streams[stream_name]
        if len(payload) > self.max_payload:
            raise PayloadTooLarge(subject, len(payload), self.max_payload)
        # Like the real server: the comparison comes first, a known id second.
        if expected is not None and stream.by_subject.get(subject, 0) != expected:
            raise Conflict(subject, expected)
        known = stream.msg_ids.get(msg_id)
        if known is not None and self.monotonic() - known[1] < DUPLICATE_WINDOW_S:
            return known[0]
        if stream.num_bytes + len(payload) > stream.max_bytes:
            raise StreamFull(subject)
        seq = stream.last_seq + 1
        stream.add(Record(seq, subject, payload, self.clock()))
        if msg_id:
            stream.msg_ids[msg_id] = (seq, self.monotonic())
        return seq

    def restore(self, stream_name: str, record: Record) -> None:
        """Store a message at the sequence it had on another server, whatever its size.

        Raises:
            ValueError: the stream is there already; sequences ascend, gaps are what was purged.
        """
        stream = self.streams[stream_name]
        if record.seq <= stream.last_seq:
            raise ValueError(f"{stream_name} is at {stream.last_seq} already, not at {record.seq}")
        stream.add(record)

    def purge(self, stream_name: str, below_seq: int, subject: str | None) -> None:
        stream = self.streams[stream_name]
        doomed = [
            seq
            for seq in stream.order[: bisect_left(stream.order, below_seq)]
            if subject is None or matches(subject, stream.records[seq].subject)
        ]
        for seq in doomed:
            stream.remove(seq)
            for consumer in stream.consumers.values():
                consumer.pending.pop(seq, None)

    # --- work queues
    def take(self, stream: MemoryStream, consumer: MemoryConsumer, limit: int) -> list[Record]:
        """Deliver up to `limit` jobs: overdue ones first, then new ones."""
        now = self.monotonic()
        due = [seq for seq, pending in sorted(consumer.pending.items()) if pending.due <= now]
        taken = [stream.records[seq] for seq in due[:limit]]
        room = min(limit - len(taken), consumer.max_ack_pending - len(consumer.pending))
        if room > 0:
            fresh = list(islice(stream.since(consumer.position), room))
            taken += fresh
            if fresh:
                consumer.position = fresh[-1].seq + 1
        for record in taken:
            before = consumer.pending.get(record.seq)
            delivered = 1 + (before.num_delivered if before else 0)
            consumer.pending[record.seq] = Pending(now + consumer.ack_wait_s, delivered)
        return taken

    def finish(self, stream: MemoryStream, consumer: MemoryConsumer, seq: int) -> None:
        """Ack or term: the job leaves the queue."""
        consumer.pending.pop(seq, None)
        if stream.retention == "workqueue":
            stream.remove(seq)
        stream.changed.notify()

    # --- core
    def subscribe(self, pattern: str, queue: str, deliver: Deliver) -> Callable[[], None]:
        """Register interest; the returned call removes it."""
        interest = _Interest(pattern, queue, deliver)
        if "*" in pattern or ">" in pattern or queue:
            self._interests.append(interest)
            return lambda: self._interests.remove(interest)
        # An inbox is exact and private: found by name, not by scanning a thousand of them.
        if pattern in self._inboxes:
            self._interests.append(interest)
            return lambda: self._interests.remove(interest)
        self._inboxes[pattern] = interest
        return lambda: self._inboxes.pop(pattern, None) and None

    def publish(self, subject: str, payload: bytes, reply: str = "") -> None:
        """Hand one message to every plain subscriber and to one member of every queue group."""
        if not self.up:
            return
        message = CoreMessage(subject, payload, reply)
        receivers: list[Deliver] = []
        groups: dict[tuple[str, str], list[Deliver]] = {}
        exact = self._inboxes.get(subject)
        if exact is not None:
            receivers.append(exact.deliver)
        for interest in self._interests:
            if matches(interest.pattern, subject):
                if interest.queue:
                    key = (interest.pattern, interest.queue)
                    groups.setdefault(key, []).append(interest.deliver)
                else:
                    receivers.append(interest.deliver)
        for members in groups.values():
            self._turn += 1
            receivers.append(members[self._turn % len(members)])
        for deliver in receivers:
            deliver(message)
        if reply and not receivers:
            self.publish(reply, b"")
