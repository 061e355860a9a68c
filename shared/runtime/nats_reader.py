"""Ordered, gap-free reading of a stream from a position, whatever happens to the server."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections import deque
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from enum import Enum, auto

from shared.runtime.bus import Record
from shared.runtime.errors import BusUnavailable
from shared.runtime.jetstream import (
    API,
    STREAM_NOT_FOUND,
    ApiError,
    parse_answer,
    parse_delivery,
    pull_request,
    reader_config,
)
from shared.runtime.nats_link import Delivered, Msg, NatsLink
from shared.runtime.pending_requests import AttemptFailed

BATCH = 512
"""Messages of one pull request."""
BATCH_BYTES = 32 * 1024 * 1024
"""Bounds what a slow reader holds in memory; above any single message."""
PULL_S = 10.0
HEARTBEAT_S = 2.0
"""The server speaks at least so often while a pull waits; three misses mean it is lost."""
INACTIVE_S = 60.0
"""The server forgets a reader that asked for nothing for so long; it is then rebuilt."""
RETRY_PAUSE_S = 0.1


class Step(Enum):
    """What a status of the server means for a reader."""

    WAIT = auto()
    PULL = auto()
    """The pull request is used up: ask again."""
    REBUILD = auto()
    """The consumer is gone or cannot be trusted: make another from the last position."""


def after_status(status: str, description: str) -> Step:
    """Decide what a message without content from the server means."""
    if status == "100":
        return Step.WAIT
    if status in ("404", "408"):
        return Step.PULL
    if status == "409" and (
        "exceeds maxbytes" in description.lower() or "batch completed" in description.lower()
    ):
        return Step.PULL
    return Step.REBUILD


@dataclass(slots=True, eq=False)
class _Stage:
    """One incarnation of the server-side consumer."""

    name: str
    delivered: Delivered | None = None
    arrived: deque[Msg] = field(default_factory=deque[Msg])
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    broken: bool = False
    consumer_seq: int = 0
    """Of the last message taken: consecutive, or something was lost on the way."""
    num_pulls: int = 0
    pull_inbox: str = ""
    """Of the running pull request: an earlier one's last word must not end it."""
    in_flight: int = 0
    """Messages the running pull request may still bring."""

    def take(self, msg: Msg) -> None:
        self.arrived.append(msg)
        self.wake.set()

    def lose(self) -> None:
        """The connection dropped: what was under way is void."""
        self.broken = True
        self.wake.set()


class NatsReader:
    """Reads one stream; `batches` is a generator to be closed by the caller."""

    def __init__(self, link: NatsLink, stream: str, start_seq: int, subject: str | None) -> None:
        self._link = link
        self._stream = stream
        self._subject = subject
        self._position = start_seq

    async def batches(self) -> AsyncGenerator[list[Record], None]:
        """Yield non-empty batches in order, for ever.

        Raises:
            BusUnavailable: no connection, or no such stream, for longer than the retry bound.
        """
        while True:
            stage = await self._build()
            try:
                while not stage.broken:
                    batch = await self._take(stage)
                    if batch:
                        self._position = batch[-1].seq + 1
                        yield batch
            finally:
                await self._discard(stage)
            self._link.counters["reader_rebuilds"] += 1
            await asyncio.sleep(RETRY_PAUSE_S)

    # --- the consumer on the server
    async def _build(self) -> _Stage:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._link.retry_s
        problem = "no answer"
        while True:
            await self._link.until_up()
            name = f"read-{uuid.uuid4().hex[:16]}"
            config = reader_config(name, self._position, self._subject, INACTIVE_S)
            request = {"stream_name": self._stream, "config": config, "action": "create"}
            tail = "" if self._subject is None else f".{self._subject}"
            try:
                answer = await self._link.attempt(
                    f"{API}.CONSUMER.CREATE.{self._stream}.{name}{tail}",
                    json.dumps(request).encode(),
                )
            except AttemptFailed as error:
                problem = str(error)
            else:
                if not answer.status:
                    parsed = parse_answer(answer.data)
                    if not isinstance(parsed, ApiError):
                        return await self._attach(name)
                    problem = parsed.description
                    if not parsed.is_transient and parsed.err_code != STREAM_NOT_FOUND:
                        raise BusUnavailable(f"reading {self._stream}: {problem}")
            if loop.time() >= deadline:
                raise self._link.unavailable(f"reading {self._stream}: {problem}")
            await asyncio.sleep(RETRY_PAUSE_S)

    async def _attach(self, name: str) -> _Stage:
        stage = _Stage(name)
        stage.delivered = await self._link.deliver(stage.take, several=True)
        self._link.on_down.add(stage.lose)
        return stage

    async def _discard(self, stage: _Stage) -> None:
        self._link.on_down.discard(stage.lose)
        if stage.delivered is not None:
            await self._link.unsubscribe(stage.delivered.subscription)
        await self._link.send(f"{API}.CONSUMER.DELETE.{self._stream}.{stage.name}", b"")

    # --- messages
    async def _take(self, stage: _Stage) -> list[Record]:
        """Wait for something to arrive; return the records among it."""
        if not stage.arrived:
            if stage.in_flight <= 0:
                await self._pull(stage)
            try:
                async with asyncio.timeout(3 * HEARTBEAT_S):
                    await stage.wake.wait()
            except TimeoutError:
                stage.broken = True
                return []
        stage.wake.clear()
        batch: list[Record] = []
        while stage.arrived and not stage.broken:
            self._sort(stage, stage.arrived.popleft(), batch)
        return batch

    def _sort(self, stage: _Stage, msg: Msg, batch: list[Record]) -> None:
        delivery = parse_delivery(msg.reply)
        if delivery is None:
            if msg.subject != stage.pull_inbox:
                return
            headers = msg.headers or {}
            step = after_status(headers.get("Status", ""), headers.get("Description", ""))
            if step is Step.PULL:
                stage.in_flight = 0
            stage.broken = step is Step.REBUILD
            return
        if delivery.consumer_seq != stage.consumer_seq + 1:
            self._link.counters["reader_gaps"] += 1
            stage.broken = True
            return
        stage.consumer_seq = delivery.consumer_seq
        stage.in_flight -= 1
        batch.append(Record(delivery.stream_seq, msg.subject, msg.data, delivery.stored_at))

    async def _pull(self, stage: _Stage) -> None:
        assert stage.delivered is not None
        stage.in_flight = BATCH
        stage.num_pulls += 1
        stage.pull_inbox = f"{stage.delivered.inbox}.{stage.num_pulls}"
        await self._link.send(
            f"{API}.CONSUMER.MSG.NEXT.{self._stream}.{stage.name}",
            pull_request(BATCH, expires_s=PULL_S, max_bytes=BATCH_BYTES, heartbeat_s=HEARTBEAT_S),
            stage.pull_inbox,
        )
