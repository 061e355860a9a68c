"""Open requests: from `accepted` over heartbeats to the final reply.

Intake: consumes requests; waits for nobody; produces `accepted` and one task per request.
Request: consumes its request; waits for its version (bounded) and for the engine; produces the
final reply.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Container
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from services.rollout.engine import EngineDead, SampleResult, SampleSpec
from services.rollout.engine_host import EngineHost
from services.rollout.intake import Desk, Ignore, Limits, Serve, judge, pressure
from shared.runtime.context import Context
from shared.runtime.errors import BusError, PayloadTooLarge
from shared.wire.base import Array
from shared.wire.codec import encode
from shared.wire.messages import (
    Accepted,
    Behind,
    Done,
    Heartbeat,
    Partial,
    Refused,
    SampledTokens,
    SampleReply,
    SampleRequest,
)

Body = Accepted | Heartbeat | Behind | Partial | Done | Refused
Reason = Literal["drain", "interrupt", "cancelled"]

NOTHING = SampledTokens(token_ids=Array.of([], "i4"), logprobs=Array.of([], "f4"), spans=())
"""What a request has that ends before its first token."""


@dataclass(slots=True, eq=False)
class _Entry:
    request: SampleRequest
    reply: str
    task: asyncio.Task[None] | None = None
    ended: Reason | None = None
    """Why it ends before it is done, once that is decided."""
    expired: bool = False


class Requests:
    """All requests this pod accepted and has not answered yet.

    Args:
        context: bus, log and counters.
        host: the engine.
        group: where requests run.
        model_id: the model served.
        max_concurrency: most open requests.
        behind_wait_s: how long a request waits for a version that is on its way.
        limits: how full the engine may become.
    """

    def __init__(
        self,
        context: Context,
        host: EngineHost,
        group: asyncio.TaskGroup,
        *,
        model_id: str,
        max_concurrency: int,
        behind_wait_s: float,
        limits: Limits,
    ) -> None:
        self._context = context
        self._host = host
        self._group = group
        self._model_id = model_id
        self._max_concurrency = max_concurrency
        self._behind_wait_s = behind_wait_s
        self._limits = limits
        self._entries: dict[str, _Entry] = {}
        self._draining = False
        self._changed = asyncio.Event()
        """Replaced by `look_again`."""
        self.engine_died = asyncio.Event()
        """Set when a request found the engine dead."""

    @property
    def open_ids(self) -> Container[str]:
        return self._entries.keys()

    def __len__(self) -> int:
        return len(self._entries)

    async def take(self, request: SampleRequest, reply: str) -> None:
        """Accept a request, refuse it or let it drop."""
        self._context.count("requests")
        desk = Desk(
            model_id=self._model_id,
            open_ids=self._entries,
            num_open=len(self._entries),
            max_concurrency=self._max_concurrency,
            unable="draining" if self._draining else self._host.problem,
            pressure=pressure(self._host.engine.load(), self._limits),
        )
        verdict = judge(request, reply, time.time(), desk)
        match verdict:
            case Ignore(cause):
                self._context.count(f"{cause}_requests")
            case Refused():
                self._context.count("refused_requests")
                await self._answer(reply, request.request_id, verdict)
            case Serve():
                entry = _Entry(request, reply)
                self._entries[request.request_id] = entry
                accepted = Accepted(version=self._host.version)
                await self._answer(reply, request.request_id, accepted)
                entry.task = self._group.create_task(self._serve(entry))

    def cancel(self, request_id: str) -> None:
        """Nobody waits for this request any more; unknown ones are none of ours."""
        entry = self._entries.get(request_id)
        if entry is not None:
            self._context.count("cancelled_requests")
            self._end(entry, "cancelled")

    def look_again(self) -> None:
        """Wake whoever waits for a version."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def heartbeat(self) -> None:
        """Say that each request is still being served; end those nobody waits for."""
        now = time.time()
        for entry in list(self._entries.values()):
            request_id = entry.request.request_id
            if entry.request.expires <= now:
                entry.expired = True
                self._end(entry, "cancelled")
            elif request_id in self._entries:
                num_sampled = self._host.engine.num_sampled(request_id)
                await self._answer(entry.reply, request_id, Heartbeat(num_sampled=num_sampled))

    async def drain(self) -> None:
        """Refuse what comes, send what was sampled so far, return when nothing is open."""
        self._draining = True
        self.look_again()
        for entry in self._entries.values():
            self._end(entry, "drain")
        tasks = [entry.task for entry in self._entries.values() if entry.task is not None]
        if tasks:
            await asyncio.wait(tasks)

    def abandon(self) -> None:
        """Drop whatever is still open, unanswered."""
        for entry in self._entries.values():
            if entry.task is not None:
                entry.task.cancel()

    # --- one request
    def _end(self, entry: _Entry, reason: Reason) -> None:
        entry.ended = entry.ended or reason
        self.look_again()
        self._host.engine.interrupt(entry.request.request_id)

    async def _serve(self, entry: _Entry) -> None:
        request_id = entry.request.request_id
        try:
            body = await self._body(entry)
        finally:
            del self._entries[request_id]
        if entry.expired:
            self._context.count("expired_requests")
        else:
            await self._answer(entry.reply, request_id, body)

    async def _body(self, entry: _Entry) -> Behind | Partial | Done | Refused:
        """Sample and return the final reply."""
        request = entry.request
        caught_up = await self._caught_up(entry)
        if entry.ended is not None:
            return Partial(sampled=NOTHING, reason=entry.ended)
        if not caught_up:
            self._context.count("behind_requests")
            return Behind(version=self._host.version)
        engine = self._host.engine
        try:
            result = await engine.sample(_spec(request))
        except ValueError as error:
            self._context.count("refused_requests")
            return Refused(reason=str(error))
        except EngineDead as error:
            self._host.died(engine, error)
            self.engine_died.set()
            return Refused(reason=f"the engine died: {error}", retryable=True)
        return self._final(entry, result)

    def _final(self, entry: _Entry, result: SampleResult) -> Partial | Done:
        sampled = _on_the_wire(result.sampled)
        if result.finish == "interrupted":
            self._context.count("interrupted_turns")
            return Partial(sampled=sampled, reason=entry.ended or "interrupt")
        return Done(sampled=sampled, finish=result.finish)

    async def _caught_up(self, entry: _Entry) -> bool:
        """Wait a little for a version that is on its way; not for a request that is to end."""
        min_version = entry.request.min_version
        if self._host.least_version < min_version:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._behind_wait_s):
                    while self._host.least_version < min_version and entry.ended is None:
                        await self._changed.wait()
        return self._host.least_version >= min_version

    async def _answer(self, reply: str, request_id: str, body: Body) -> None:
        message = SampleReply(request_id=request_id, pod=self._context.pod, body=body)
        try:
            await self._context.bus.publish(reply, encode(message))
        except PayloadTooLarge as error:
            # Asked again it would be as large: the caller is told, once.
            self._context.count("replies_too_large")
            if not isinstance(body, Refused):
                reason = f"the answer is too large: {error}; raise its max_payload"
                await self._answer(reply, request_id, Refused(reason=reason))
        except BusError as error:
            # The caller misses heartbeats and asks again under a new id.
            self._context.count("unsent_replies")
            self._context.log.warning("reply_unsent", request_id=request_id, reason=str(error))


def _spec(request: SampleRequest) -> SampleSpec:
    held = request.routing_held
    return SampleSpec(
        request_id=request.request_id,
        token_ids=tuple(request.token_ids.numpy().tolist()),
        sampling=request.sampling,
        max_new_tokens=request.max_new_tokens,
        seed=request.seed,
        seed_offset=request.seed_offset,
        routing_held=None if held is None else (held.version, held.stop),
    )


def _on_the_wire(sampled: SampledTokens) -> SampledTokens:
    """Return it with log-probs as f4, whatever the engine computes in."""
    if sampled.logprobs.dtype == "f4":
        return sampled
    return sampled.model_copy(update={"logprobs": Array.of(sampled.logprobs.numpy(), "f4")})
