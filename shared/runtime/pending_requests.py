"""Requests under way on one connection: which inbox waits for which answer."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass


class AttemptFailed(Exception):
    """One attempt of a request got no answer; another may."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The reply to a request."""

    status: str
    """Of a message without content from the server itself: 404, 408, 409, 503; else empty."""
    headers: dict[str, str]
    data: bytes


@dataclass(slots=True)
class _Waiting:
    subject: str
    future: asyncio.Future[Answer]


class PendingRequests:
    """Futures by inbox; each ends once, by answer or by failure."""

    def __init__(self) -> None:
        self._waiting: dict[str, _Waiting] = {}

    def expect(self, inbox: str, subject: str) -> asyncio.Future[Answer]:
        """Wait for the answer to a request sent to `subject`; `forget` it in any case."""
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting[inbox] = _Waiting(subject, future)
        return future

    def forget(self, inbox: str) -> None:
        self._waiting.pop(inbox, None)

    def answer(self, inbox: str, headers: dict[str, str], data: bytes) -> bool:
        """Hand in a message; whether somebody waited for it."""
        waiting = self._waiting.get(inbox)
        if waiting is None:
            return False
        if not waiting.future.done():
            status = "" if data else headers.get("Status", "")
            waiting.future.set_result(Answer(status, headers, data))
        return True

    def fail(self, error: Exception, subject: str | None = None) -> None:
        """Fail every request, or those to `subject` (given in lower case, as the server does)."""
        for waiting in self._waiting.values():
            if subject is not None and waiting.subject.lower() != subject:
                continue
            if not waiting.future.done():
                waiting.future.set_exception(error)
