"""A work queue over a durable pull consumer: never more jobs in hand than were asked for."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from shared.runtime.bus import Job, Record
from shared.runtime.errors import BusUnavailable
from shared.runtime.jetstream import (
    API,
    CONSUMER_NOT_FOUND,
    NS,
    ApiError,
    parse_answer,
    parse_delivery,
    pull_request,
    queue_config,
)
from shared.runtime.nats_link import Delivered, Msg, NatsLink
from shared.runtime.pending_requests import Answer, AttemptFailed

Request = Callable[[str, bytes], Awaitable[Answer]]
"""One request, retried within the bound of the bus."""
Resolve = Callable[[Record], Awaitable[Record]]

LATE_S = 1.0
"""How long after a pull expired its last word is waited for."""
COMPANY_S = 0.25
"""A request that does not wait is silent only when max_ack_pending is reached."""
SILENT_ENDS = 2
"""Unanswered acknowledgements over a standing connection before the job is let go."""
FORGOTTEN_S = 0.5
"""Bound of the one attempt made when the job was delivered before a reconnect."""
RETRY_PAUSE_S = 0.1


class NatsJob:
    """One delivery."""

    def __init__(self, link: NatsLink, record: Record, reply: str, num_delivered: int) -> None:
        self.record = record
        self.num_delivered = num_delivered
        self._link = link
        self._reply = reply
        self._epoch = link.counters["reconnects"]

    async def ack(self) -> None:
        await self._end(b"+ACK")

    async def nak(self, delay_s: float = 0.0) -> None:
        option = b' {"delay": %d}' % int(delay_s * NS) if delay_s > 0 else b""
        await self._link.send(self._reply, b"-NAK" + option)

    async def term(self) -> None:
        await self._end(b"+TERM")

    async def in_progress(self) -> None:
        await self._link.send(self._reply, b"+WPI")

    async def _end(self, word: bytes) -> None:
        """Say the last word and wait for its confirmation, within the retry bound.

        A killed server forgets its newest deliveries and never answers for them; it will deliver
        the job again, as if for the first time. That is no reason to wait or to fail.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._link.retry_s
        silent = 0
        while silent < SILENT_ENDS:
            await self._link.until_up(deadline)
            forgotten = self._link.counters["reconnects"] != self._epoch
            bound_s = min(FORGOTTEN_S, self._link.attempt_s) if forgotten else None
            try:
                await self._link.attempt(self._reply, word, timeout_s=bound_s)
            except AttemptFailed:
                if forgotten and self._link.connected:
                    break
                silent += self._link.connected
                await asyncio.sleep(RETRY_PAUSE_S)
            else:
                return
        self._link.counters["unconfirmed_acks"] += 1


@dataclass(slots=True, eq=False)
class _Pull:
    """One running pull request."""

    inbox: str
    remaining: int
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    lost: bool = False
    """The server knows no such consumer."""


class NatsWorkQueue:
    """One reader of a durable consumer."""

    def __init__(
        self,
        link: NatsLink,
        request: Request,
        resolve: Resolve,
        stream: str,
        durable: str,
        *,
        ack_wait_s: float,
        max_ack_pending: int,
    ) -> None:
        self._link = link
        self._request = request
        self._resolve = resolve
        self._stream = stream
        self._durable = durable
        self._config = queue_config(durable, ack_wait_s, max_ack_pending)
        self._jobs: deque[NatsJob] = deque()
        self._delivered: Delivered | None = None
        self._num_pulls = 0
        self._num_behind = 0
        """Jobs never delivered, as of the last delivery."""
        self._pull_now: _Pull | None = None
        self._closed = False
        link.on_down.add(self._drop_pull)

    async def create(self) -> None:
        """Create or join the consumer; an existing one takes over these bounds.

        Raises:
            BusUnavailable: the server refuses, or does not answer within the bound.
        """
        request = {"stream_name": self._stream, "config": self._config, "action": ""}
        if self._delivered is None:
            self._delivered = await self._link.deliver(self._arrived, several=True)
        answer = await self._request(
            f"{API}.CONSUMER.CREATE.{self._stream}.{self._durable}", json.dumps(request).encode()
        )
        parsed = parse_answer(answer.data)
        if isinstance(parsed, ApiError):
            raise BusUnavailable(
                f"work queue {self._durable} on {self._stream}: {parsed.description}"
            )

    async def next(self, max_jobs: int, timeout_s: float) -> list[Job]:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        while not self._jobs:
            left = deadline - loop.time()
            if left <= 0 or self._closed:
                return []
            if not self._link.connected:
                await self._await_link(deadline)
                continue
            # The very next job, then those there already: never a request that outlives the call
            # and brings jobs to somebody who has no place for them.
            if await self._pull(1, wait_s=left, bound_s=left + LATE_S):
                company = min(max_jobs - 1, self._num_behind)
                if company > 0:
                    await self._pull(company, wait_s=0.0, bound_s=COMPANY_S)
        taken = [self._jobs.popleft() for _ in range(min(max_jobs, len(self._jobs)))]
        for job in taken:
            self._link.counters["redeliveries"] += job.num_delivered > 1
            job.record = await self._resolve(job.record)
        return list(taken)

    async def pending(self) -> tuple[int, int]:
        answer = await self._request(f"{API}.CONSUMER.INFO.{self._stream}.{self._durable}", b"")
        parsed = parse_answer(answer.data)
        if isinstance(parsed, ApiError):
            if parsed.err_code == CONSUMER_NOT_FOUND:
                await self.create()
                return await self.pending()
            raise BusUnavailable(f"work queue {self._durable}: {parsed.description}")
        return int(parsed["num_pending"]), int(parsed["num_ack_pending"])

    async def close(self) -> None:
        """Stop pulling; jobs that arrived and were not handed out go back at once."""
        self._closed = True
        self._link.on_down.discard(self._drop_pull)
        self._drop_pull()
        while self._jobs:
            await self._jobs.popleft().nak()
        # The subscription stays until the connection ends: a request under way may still bring a
        # job, which is handed back at once instead of waiting for its redelivery timer.

    # --- inside
    async def _await_link(self, deadline: float) -> None:
        """Wait for the connection until `deadline`; raises once it was away for too long."""
        if self._link.down_for_s > self._link.retry_s:
            raise self._link.unavailable("no connection")
        try:
            await self._link.until_up(deadline)
        except BusUnavailable:
            if self._link.down_for_s > self._link.retry_s:
                raise

    async def _pull(self, batch: int, *, wait_s: float, bound_s: float) -> bool:
        """Ask for `batch` jobs; whether any arrived. Returns at the end of the request."""
        assert self._delivered is not None
        self._num_pulls += 1
        pull = _Pull(f"{self._delivered.inbox}.{self._num_pulls}", batch)
        self._pull_now = pull
        request = pull_request(batch, no_wait=wait_s <= 0, expires_s=max(0.0, wait_s))
        before = len(self._jobs)
        try:
            await self._link.send(
                f"{API}.CONSUMER.MSG.NEXT.{self._stream}.{self._durable}", request, pull.inbox
            )
            async with asyncio.timeout(bound_s):
                await pull.ended.wait()
        except TimeoutError:
            self._link.counters["pulls_unanswered"] += 1
        if pull.lost and not self._closed:
            await asyncio.sleep(RETRY_PAUSE_S)
            await self.create()
        return len(self._jobs) > before

    async def _arrived(self, msg: Msg) -> None:
        pull = self._pull_now
        delivery = parse_delivery(msg.reply)
        if delivery is None:
            if pull is None or msg.subject != pull.inbox:
                return  # the last word of a request nobody waits for any more
            headers = msg.headers or {}
            status, description = headers.get("Status", ""), headers.get("Description", "")
            pull.lost = status == "503" or (status == "409" and "deleted" in description.lower())
            pull.ended.set()
            return
        record = Record(delivery.stream_seq, msg.subject, msg.data, delivery.stored_at)
        job = NatsJob(self._link, record, msg.reply, delivery.num_delivered)
        if self._closed:
            await job.nak()
            return
        self._jobs.append(job)
        self._num_behind = delivery.num_pending
        if pull is not None:
            pull.remaining -= 1
            if pull.remaining <= 0:
                pull.ended.set()

    def _drop_pull(self) -> None:
        """The connection dropped: the server may have forgotten the request."""
        if self._pull_now is not None:
            self._pull_now.ended.set()
