"""JetStream calls with their bounds: retried while the server may still answer, read back after."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from typing import Any

from shared.runtime.errors import BusUnavailable, Conflict, StreamFull
from shared.runtime.jetstream import (
    API,
    HEADER_EXPECTED,
    HEADER_MSG_ID,
    WRONG_LAST_SEQUENCE,
    ApiError,
    parse_answer,
)
from shared.runtime.logs import Log
from shared.runtime.nats_link import NatsLink
from shared.runtime.pending_requests import Answer, AttemptFailed

RETRY_PAUSE_S = 0.1
APPENDS_IN_FLIGHT = 256
"""Own publish window: more would only queue inside the client, unbounded."""


class NatsCalls:
    """What one connection asks of JetStream."""

    def __init__(self, link: NatsLink, log: Log) -> None:
        self._link = link
        self._log = log
        self._window = asyncio.Semaphore(APPENDS_IN_FLIGHT)

    async def append(
        self, stream: str, subject: str, payload: bytes, expected: int | None, msg_id: str | None
    ) -> int:
        """Store one message under an id of its own, and return its sequence.

        Raises:
            Conflict, StreamFull, BusUnavailable, PayloadTooLarge, Denied: as the bus promises.
        """
        headers = {HEADER_MSG_ID: msg_id or uuid.uuid4().hex}
        if expected is not None:
            headers[HEADER_EXPECTED] = str(expected)
        deadline = time.monotonic() + self._link.retry_s
        problem = ""
        async with self._window:
            while True:
                retried = bool(problem)
                await self._link.until_up(deadline)
                try:
                    answer = await self._link.attempt(subject, payload, headers)
                except AttemptFailed as error:
                    problem = str(error)
                else:
                    parsed = None if answer.status else parse_answer(answer.data)
                    if isinstance(parsed, dict):
                        return int(parsed["seq"])
                    if parsed is None:
                        problem = f"{subject}: nobody stores it; has the learner made the streams?"
                    elif parsed.err_code in WRONG_LAST_SEQUENCE:
                        if retried:
                            ours = await self._stored_as(stream, subject, headers[HEADER_MSG_ID])
                            if ours is not None:
                                return ours
                        raise Conflict(subject, -1 if expected is None else expected)
                    elif parsed.is_full:
                        self._log.error("stream_full", subject=subject, why=parsed.description)
                        raise StreamFull(subject)
                    elif parsed.is_transient:
                        problem = f"{subject}: {parsed.description}"
                    else:
                        raise BusUnavailable(f"{subject}: {parsed.description}")
                self._link.counters["publish_retries"] += 1
                if time.monotonic() >= deadline:
                    raise self._link.unavailable(problem)
                await asyncio.sleep(RETRY_PAUSE_S)

    async def _stored_as(self, stream: str, subject: str, msg_id: str) -> int | None:
        """Sequence of the subject's newest message if an earlier attempt of ours stored it."""
        answer = await self.request(f"{API}.DIRECT.GET.{stream}.{subject}", b"")
        if answer.status or answer.headers.get(HEADER_MSG_ID) != msg_id:
            return None
        return int(answer.headers["Nats-Sequence"])

    async def api(self, call: str, request: dict[str, Any]) -> dict[str, Any] | ApiError:
        """Make an API call; errors that may pass are retried, others returned."""
        deadline = time.monotonic() + self._link.retry_s
        while True:
            answer = await self.request(f"{API}.{call}", json.dumps(request).encode())
            parsed = parse_answer(answer.data)
            if not isinstance(parsed, ApiError) or not parsed.is_transient:
                return parsed
            if time.monotonic() >= deadline:
                raise self._link.unavailable(f"{call}: {parsed.description}")
            await asyncio.sleep(RETRY_PAUSE_S)

    async def request(self, subject: str, payload: bytes) -> Answer:
        """Send an idempotent request until it is answered, within the retry bound."""
        deadline = time.monotonic() + self._link.retry_s
        while True:
            await self._link.until_up(deadline)
            try:
                answer = await self._link.attempt(subject, payload)
                if answer.status != "503":
                    return answer
                problem = f"{subject}: no responders; does the stream exist, is JetStream on?"
            except AttemptFailed as error:
                problem = str(error)
            self._link.counters["request_retries"] += 1
            if time.monotonic() >= deadline:
                raise self._link.unavailable(problem)
            await asyncio.sleep(RETRY_PAUSE_S)
