"""The in-memory work queue: the same deliveries, redeliveries and counts as the real one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shared.runtime.bus import Job, Record
from shared.runtime.memory_server import MemoryConsumer, MemoryStream

if TYPE_CHECKING:
    from shared.runtime.memory_bus import MemoryBus


class MemoryJob:
    """One delivery."""

    def __init__(self, queue: MemoryWorkQueue, record: Record, num_delivered: int) -> None:
        self._queue = queue
        self._seq = record.seq
        self.record = record
        self.num_delivered = num_delivered

    async def ack(self) -> None:
        await self._queue.finish(self._seq)

    async def nak(self, delay_s: float = 0.0) -> None:
        self._queue.postpone(self._seq, delay_s)

    async def term(self) -> None:
        await self._queue.finish(self._seq)

    async def in_progress(self) -> None:
        self._queue.postpone(self._seq, self._queue.consumer.ack_wait_s)


class MemoryWorkQueue:
    """One reader of a durable consumer."""

    def __init__(self, bus: MemoryBus, stream: MemoryStream, consumer: MemoryConsumer) -> None:
        self._bus = bus
        self._stream = stream
        self.consumer = consumer

    async def next(self, max_jobs: int, timeout_s: float) -> list[Job]:
        server = self._bus.server
        deadline = server.monotonic() + timeout_s
        while True:
            await self._bus.until_up()
            jobs: list[Job] = []
            for record in server.take(self._stream, self.consumer, max_jobs):
                delivered = self.consumer.pending[record.seq].num_delivered
                self._bus.counters["redeliveries"] += delivered > 1
                jobs.append(MemoryJob(self, await self._bus.resolved(record), delivered))
            now = server.monotonic()
            if jobs or now >= deadline:
                return jobs
            due = [p.due for p in self.consumer.pending.values()]
            await self._stream.changed.wait(max(0.0, min([deadline, *due]) - now))

    async def pending(self) -> tuple[int, int]:
        await self._bus.until_up()
        fresh = sum(1 for _ in self._stream.since(self.consumer.position))
        return fresh, len(self.consumer.pending)

    async def close(self) -> None:
        return None

    async def finish(self, seq: int) -> None:
        await self._bus.until_up()
        self._bus.server.finish(self._stream, self.consumer, seq)

    def postpone(self, seq: int, delay_s: float) -> None:
        pending = self.consumer.pending.get(seq)
        if pending is not None:
            pending.due = self._bus.server.monotonic() + delay_s
            self._stream.changed.notify()
