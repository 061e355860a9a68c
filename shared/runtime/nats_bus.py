"""The bus over NATS JetStream: bounded retries, compare-and-set with read-back, loud refusals."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import replace
from typing import Any, cast

from shared.runtime import blobs
from shared.runtime.bus import CoreMessage, Record, StreamState, Subscription, WorkQueue
from shared.runtime.errors import BusUnavailable, PayloadTooLarge
from shared.runtime.jetstream import (
    API,
    STREAM_EXISTS_DIFFERENTLY,
    ApiError,
    bucket_config,
    parse_direct,
    stream_config,
)
from shared.runtime.logs import Log
from shared.runtime.nats_access import read_access
from shared.runtime.nats_calls import NatsCalls
from shared.runtime.nats_link import Msg, NatsLink, NatsSubscription
from shared.runtime.nats_queue import NatsWorkQueue
from shared.runtime.nats_reader import NatsReader
from shared.runtime.sections import BusSection
from shared.runtime.streams import stream_of
from shared.wire.subjects import STREAMS, StreamName, Subjects

Handler = Callable[[CoreMessage], Awaitable[None]]

POLL_S = 0.25


async def connect(bus: BusSection, subjects: Subjects, name: str, log: Log) -> NatsBus:
    """Connect to NATS as `name` (its inboxes are `_INBOX.<name>.>`).

    Raises:
        BusUnavailable: nobody answered within `connect_timeout_s`.
        ConfigError: a password, credentials or certificate file cannot be used.
    """
    access = read_access(bus)
    token = re.sub(r"[^A-Za-z0-9_-]", "-", name) or "lagwise"
    link = NatsLink(token, log, attempt_s=bus.request_timeout_s, retry_s=bus.retry_s)
    servers = [url.strip() for url in bus.url.split(",")]
    await link.open(servers, bus.connect_timeout_s, access)
    return NatsBus(link, subjects, bus.max_stream_bytes, log)


class NatsBus:
    """One connection of one service; build it with `connect`."""

    def __init__(self, link: NatsLink, subjects: Subjects, max_stream_bytes: int, log: Log) -> None:
        self.subjects = subjects
        self.max_payload = link.client.max_payload
        self.counters: Counter[str] = link.counters
        self._link = link
        self._log = log
        self._max_stream_bytes = max_stream_bytes
        self._calls = NatsCalls(link, log)
        self._bucket = subjects.control_bucket

    @property
    def connected(self) -> bool:
        return self._link.connected

    # --- life cycle
    async def create_streams(self) -> None:
        configs = [stream_config(self.subjects, spec, self._max_stream_bytes) for spec in STREAMS]
        for config in [*configs, bucket_config(self._bucket)]:
            answer = await self._calls.api(f"STREAM.CREATE.{config['name']}", config)
            if isinstance(answer, ApiError) and answer.err_code == STREAM_EXISTS_DIFFERENTLY:
                answer = await self._calls.api(f"STREAM.UPDATE.{config['name']}", config)
            if isinstance(answer, ApiError):
                raise BusUnavailable(
                    f"stream {config['name']}: {answer.description} (bus.max_stream_bytes, or the "
                    "server's JetStream limits)"
                )

    async def wait_for_streams(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        # Created last, so the others exist when it does.
        while isinstance(await self._calls.api(f"STREAM.INFO.KV_{self._bucket}", {}), ApiError):
            if time.monotonic() >= deadline:
                raise BusUnavailable(
                    f"the streams of run {self.subjects.run!r} do not exist after {timeout_s:g} s: "
                    "is the learner running, and run.name the same?"
                )
            await asyncio.sleep(POLL_S)

    async def close(self) -> None:
        await self._link.close()

    # --- core
    async def publish(self, subject: str, payload: bytes) -> None:
        self._check_size(subject, payload)
        await self._link.send(subject, payload)

    async def subscribe(self, subject: str, handler: Handler, *, queue: str = "") -> Subscription:
        async def receive(msg: Msg) -> None:
            try:
                await handler(CoreMessage(msg.subject, msg.data, msg.reply))
            except Exception as error:  # noqa: BLE001 - a handler never ends a subscription
                self._link.handler_failed(msg.subject, error)

        return _NatsSubscription(self._link, await self._link.subscribe(subject, queue, receive))

    def new_inbox(self) -> str:
        return self._link.new_inbox()

    async def open_inbox(self, inbox: str, handler: Handler) -> Subscription:
        # No responders: the server's 503 carries no content, just as the contract says.
        self._link.attach(inbox, lambda msg: handler(CoreMessage(msg.subject, msg.data, msg.reply)))
        return _Inbox(self._link, inbox)

    async def publish_request(self, subject: str, payload: bytes, reply: str) -> None:
        self._check_size(subject, payload)
        await self._link.send(subject, payload, reply)

    # --- logs
    async def append(
        self,
        subject: str,
        payload: bytes,
        *,
        expect_last_subject_seq: int | None = None,
        msg_id: str | None = None,
    ) -> int:
        stream = self.subjects.stream(stream_of(self.subjects, subject))
        if blobs.needs_blob(payload, self.max_payload):
            payload = await blobs.store(
                payload, self.subjects, self.max_payload, self._append_chunk
            )
        return await self._calls.append(stream, subject, payload, expect_last_subject_seq, msg_id)

    async def _append_chunk(self, subject: str, chunk: bytes, msg_id: str) -> int:
        return await self._calls.append(self.subjects.stream("blobs"), subject, chunk, None, msg_id)

    async def last(self, subject: str) -> Record | None:
        record = await self._last_raw(stream_of(self.subjects, subject), subject)
        return None if record is None else await self._resolved(record)

    async def get(self, stream: StreamName, seq: int) -> Record | None:
        record = await self._get_raw(stream, seq)
        return None if record is None else await self._resolved(record)

    async def blob_of(self, stream: StreamName, seq: int) -> str | None:
        record = await self._get_raw(stream, seq)
        ref = None if record is None else blobs.ref_of(record.payload)
        return None if ref is None else ref.digest

    async def read(
        self, stream: StreamName, start_seq: int, *, subject: str | None = None
    ) -> AsyncGenerator[list[Record], None]:
        reader = NatsReader(self._link, self.subjects.stream(stream), start_seq, subject)
        batches = reader.batches()
        try:
            async for batch in batches:
                yield [
                    await self._resolved(record) if blobs.is_ref(record.payload) else record
                    for record in batch
                ]
        finally:
            await batches.aclose()

    async def stream_state(self, stream: StreamName) -> StreamState:
        name = self.subjects.stream(stream)
        answer = await self._calls.api(f"STREAM.INFO.{name}", {})
        if isinstance(answer, ApiError):
            raise BusUnavailable(f"stream {name}: {answer.description}")
        state = answer["state"]
        return StreamState(
            max(1, int(state["first_seq"])), int(state["last_seq"]), int(state["messages"]),
            int(state["bytes"]),
        )  # fmt: skip

    async def subjects_of(self, stream: StreamName, pattern: str) -> list[str]:
        name = self.subjects.stream(stream)
        found: set[str] = set()
        offset = 0
        while True:
            request = {"subjects_filter": pattern, "offset": offset}
            answer = await self._calls.api(f"STREAM.INFO.{name}", request)
            if isinstance(answer, ApiError):
                raise BusUnavailable(f"stream {name}: {answer.description}")
            page = cast("dict[str, int]", answer["state"].get("subjects") or {})
            found.update(page)
            offset += len(page)
            # The server answers with 100,000 subjects at most; `total` says how many there are.
            if not page or offset >= int(answer.get("total", 0)):
                return sorted(found)

    async def purge(
        self, stream: StreamName, below_seq: int, *, subject: str | None = None
    ) -> None:
        if below_seq <= 1:
            return  # to the server 0 and 1 mean: everything
        request: dict[str, Any] = {"seq": below_seq}
        if subject is not None:
            request["filter"] = subject
        name = self.subjects.stream(stream)
        answer = await self._calls.api(f"STREAM.PURGE.{name}", request)
        if isinstance(answer, ApiError):
            raise BusUnavailable(f"purge of {name}: {answer.description}")

    # --- work queue
    async def work_queue(
        self, stream: StreamName, durable: str, *, ack_wait_s: float, max_ack_pending: int
    ) -> WorkQueue:
        queue = NatsWorkQueue(
            self._link,
            self._calls.request,
            self._resolved,
            self.subjects.stream(stream),
            durable,
            ack_wait_s=ack_wait_s,
            max_ack_pending=max_ack_pending,
        )
        await queue.create()
        return queue

    # --- control bucket
    async def put_control(self, key: str, payload: bytes) -> None:
        self._check_size(key, payload)
        subject = f"$KV.{self._bucket}.{key}"
        await self._calls.append(f"KV_{self._bucket}", subject, payload, None, None)

    async def get_control(self, key: str) -> bytes | None:
        subject = f"$KV.{self._bucket}.{key}"
        answer = await self._calls.request(f"{API}.DIRECT.GET.KV_{self._bucket}.{subject}", b"")
        return None if answer.status or "KV-Operation" in answer.headers else answer.data

    # --- inside
    async def _get_raw(self, stream: StreamName, seq: int) -> Record | None:
        name = self.subjects.stream(stream)
        request = json.dumps({"seq": seq}).encode()
        answer = await self._calls.request(f"{API}.DIRECT.GET.{name}", request)
        return None if answer.status else parse_direct(answer.headers, answer.data)

    async def _last_raw(self, stream: StreamName, subject: str) -> Record | None:
        name = self.subjects.stream(stream)
        answer = await self._calls.request(f"{API}.DIRECT.GET.{name}.{subject}", b"")
        return None if answer.status else parse_direct(answer.headers, answer.data)

    async def _resolved(self, record: Record) -> Record:
        payload = await blobs.resolve(record.payload, self.subjects, self._fetch_chunk)
        if payload is None:
            # Handed on as the pointer: its reader refuses the type and dead-letters it.
            self.counters["blobs_missing"] += 1
            self._log.error("blob_missing", subject=record.subject, seq=record.seq)
            return record
        return record if payload is record.payload else replace(record, payload=payload)

    async def _fetch_chunk(self, subject: str) -> bytes | None:
        record = await self._last_raw("blobs", subject)
        return None if record is None else record.payload

    def _check_size(self, subject: str, payload: bytes) -> None:
        if len(payload) > self.max_payload:
            raise PayloadTooLarge(subject, len(payload), self.max_payload)


class _Inbox:
    """A reply inbox: an entry in the link's table, no subscription of its own."""

    def __init__(self, link: NatsLink, inbox: str) -> None:
        self._link = link
        self._inbox = inbox

    async def close(self) -> None:
        self._link.detach(self._inbox)


class _NatsSubscription:
    """A core subscription."""

    def __init__(self, link: NatsLink, subscription: NatsSubscription) -> None:
        self._link = link
        self._subscription = subscription

    async def close(self) -> None:
        await self._link.unsubscribe(self._subscription)
