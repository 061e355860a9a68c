"""Asking a rollout for tokens: one request, its heartbeats, its final answer.

What to do about an answer is decided in `episodes.py`; here are only the wires. Each request in
flight has an inbox to itself, taken from a pool, so that the empty payload by which the bus says
"nobody listens" is known to belong to it; a reply to an earlier request is discarded by id.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from services.env_agents.episodes import Replied, Unanswered
from shared.runtime.bus import Bus, CoreMessage, Subscription
from shared.runtime.context import Context
from shared.runtime.logs import Log
from shared.wire.codec import decode, encode
from shared.wire.errors import WireError
from shared.wire.messages import (
    Accepted,
    Behind,
    CancelRequest,
    Done,
    Heartbeat,
    Partial,
    Refused,
    SampleReply,
    SampleRequest,
)

Answer = Replied | Unanswered


class SamplerClient:
    """Requests of all episodes of this process.

    Args:
        context: bus, log and counters.
        silence_s: a pod that says nothing for so long is given up.
    """

    def __init__(self, context: Context, *, silence_s: float) -> None:
        self._context = context
        self._bus: Bus = context.bus
        self._silence_s = silence_s
        self._idle: list[_Channel] = []

    async def ask(self, request: SampleRequest, pod: str | None) -> Answer:
        """Send a request to `pod`, or to anyone, and wait for its final answer or silence.

        Giving up, by silence or by being cancelled, tells the pod that nobody waits any more.
        """
        subjects = self._bus.subjects
        subject = subjects.sample_pod(pod) if pod else subjects.sample(request.model_id)
        channel = self._idle.pop() if self._idle else await self._open()
        answer = channel.expect(request.request_id, self._silence_s)
        reusable = False
        try:
            await self._bus.publish_request(subject, encode(request), channel.inbox)
            answered = await answer
            # A late "nobody listens" carries no id: the inbox of a silent request is not reused.
            reusable = isinstance(answered, Replied) or answered.cause == "no_responders"
            return answered
        finally:
            holder = channel.pod or pod
            channel.forget()
            if reusable:
                self._idle.append(channel)
            else:
                if holder:
                    await self._cancel(holder, request.request_id)
                await channel.close()

    async def close(self) -> None:
        """Close the idle inboxes."""
        while self._idle:
            await self._idle.pop().close()

    async def _open(self) -> _Channel:
        channel = _Channel(self._bus.new_inbox(), self._context.log)
        channel.subscription = await self._bus.open_inbox(channel.inbox, channel.receive)
        return channel

    async def _cancel(self, pod: str, request_id: str) -> None:
        cancel = encode(CancelRequest(request_id=request_id))
        await self._bus.publish(self._bus.subjects.cancel(pod), cancel)


@dataclass
class _Channel:
    """One inbox and the request that uses it now."""

    inbox: str
    log: Log
    subscription: Subscription | None = None
    pod: str | None = None
    """Who accepted the request."""
    _request_id: str = ""
    _answer: asyncio.Future[Answer] | None = None
    _silence_s: float = 0.0
    _heard_at: float = 0.0
    _timer: asyncio.TimerHandle | None = None
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)

    def expect(self, request_id: str, silence_s: float) -> asyncio.Future[Answer]:
        self._request_id, self.pod = request_id, None
        self._silence_s, self._heard_at = silence_s, self._loop.time()
        self._timer = self._loop.call_later(silence_s, self._check_silence)
        self._answer = self._loop.create_future()
        return self._answer

    def forget(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._answer = self._timer = None
        self._request_id = ""

    async def receive(self, message: CoreMessage) -> None:
        if self._answer is None or self._answer.done():
            return
        if not message.payload:
            self._answer.set_result(Unanswered(self._request_id, "no_responders"))
            return
        try:
            reply = decode(message.payload, SampleReply)
        except WireError as error:
            # Nothing to give back to: the silence that follows has the request sent again.
            self.log.warning("reply_unreadable", reason=str(error))
            return
        if reply.request_id != self._request_id:
            return
        self._heard_at = self._loop.time()
        match reply.body:
            case Accepted() | Heartbeat():
                self.pod = reply.pod
            case Behind() | Partial() | Done() | Refused() as body:
                self._answer.set_result(Replied(reply.request_id, reply.pod, body))

    async def close(self) -> None:
        if self.subscription is not None:
            await self.subscription.close()

    def _check_silence(self) -> None:
        if self._answer is None or self._answer.done():
            return
        left = self._heard_at + self._silence_s - self._loop.time()
        if left > 0:
            self._timer = self._loop.call_later(left, self._check_silence)
        else:
            self._answer.set_result(Unanswered(self._request_id, "silence"))
