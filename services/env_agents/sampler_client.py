"""Asking a rollout for tokens: one request, its heartbeats, its final answer.

What to do about an answer is decided in `episodes.py`; here are only the wires. Each request in
flight has an inbox to itself, taken from a pool, so that the empty payload by which the bus says
"nobody listens" is known to belong to it; a reply to an earlier request is discarded by id.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from services.env_agents.episode_events import Replied, Unanswered
from services.env_agents.gate import Gate
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
        gate: raises every request's `min_version` and holds it back until that is published.
    """

    def __init__(self, context: Context, *, silence_s: float, gate: Gate | None = None) -> None:
        self._context = context
        self._bus: Bus = context.bus
        self._silence_s = silence_s
        self._gate = gate
        self._idle: list[_Channel] = []
        self._in_flight: dict[str, _Flight] = {}
        """By request id, until its answer has been returned."""
        self._landed = asyncio.Event()

    async def ask(self, request: SampleRequest, pod: str | None) -> Answer:
        """Send a request to `pod`, or to anyone, and wait for its final answer or silence.

        Giving up, by silence or by being cancelled, tells the pod that nobody waits any more.
        """
        subjects = self._bus.subjects
        subject = subjects.sample_pod(pod) if pod else subjects.sample(request.model_id)
        if self._gate is not None:
            await self._gate.opened()
        channel = self._idle.pop() if self._idle else await self._open()
        reusable = False
        try:
            if self._gate is not None:
                await self._gate.opened()
                request = self._gate.raised(request)
            answer = channel.expect(request.request_id, self._silence_s)
            self._in_flight[request.request_id] = _Flight(request.min_version, channel)
            await self._bus.publish_request(subject, encode(request), channel.inbox)
            answered = await answer
            # A late "nobody listens" carries no id: the inbox of a silent request is not reused.
            reusable = isinstance(answered, Replied) or answered.cause == "no_responders"
            return _not_below(answered, request.min_version)
        finally:
            # Nothing is awaited from here to the episode: whoever waits for the landing finds the
            # answer's tokens in it.
            self._in_flight.pop(request.request_id, None)
            self._landed.set()
            holder = channel.pod or pod
            channel.forget()
            if reusable:
                self._idle.append(channel)
            else:
                if holder:
                    await self._cancel(holder, request.request_id)
                await channel.close()

    async def interrupt(self, below: int, bound_s: float) -> int:
        """End every request that may yet be sampled below a version; return how many.

        What was sampled so far comes back to its episode as usual, before this returns. A pod that
        does not give a request back within `bound_s` is taken for silent: its tokens are lost.
        """
        chosen = {r: f for r, f in self._in_flight.items() if f.min_version < below}
        for request_id, flight in chosen.items():
            flight.channel.interrupted = True
            if flight.channel.pod:
                await self._cancel(flight.channel.pod, request_id)
        try:
            async with asyncio.timeout(bound_s):
                await self._all_landed(chosen)
        except TimeoutError:
            self._context.count("interruptions_unanswered")
            for request_id in chosen.keys() & self._in_flight.keys():
                chosen[request_id].channel.give_up(request_id)
            await self._all_landed(chosen)
        return len(chosen)

    async def _all_landed(self, chosen: dict[str, _Flight]) -> None:
        while chosen.keys() & self._in_flight.keys():
            self._landed.clear()
            await self._landed.wait()

    async def close(self) -> None:
        """Close the idle inboxes."""
        while self._idle:
            await self._idle.pop().close()

    async def _open(self) -> _Channel:
        channel = _Channel(self._bus.new_inbox(), self._context.log, self._cancel)
        channel.subscription = await self._bus.open_inbox(channel.inbox, channel.receive)
        return channel

    async def _cancel(self, pod: str, request_id: str) -> None:
        cancel = encode(CancelRequest(request_id=request_id))
        await self._bus.publish(self._bus.subjects.cancel(pod), cancel)


@dataclass(frozen=True, slots=True, eq=False)
class _Flight:
    """A request nobody has answered yet."""

    min_version: int
    channel: _Channel


@dataclass
class _Channel:
    """One inbox and the request that uses it now."""

    inbox: str
    log: Log
    cancel: Callable[[str, str], Awaitable[None]]
    """(pod, request id)"""
    subscription: Subscription | None = None
    pod: str | None = None
    """Who accepted the request."""
    interrupted: bool = False
    """The request is to end as soon as somebody has accepted it."""
    _request_id: str = ""
    _answer: asyncio.Future[Answer] | None = None
    _silence_s: float = 0.0
    _heard_at: float = 0.0
    _timer: asyncio.TimerHandle | None = None
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)

    def expect(self, request_id: str, silence_s: float) -> asyncio.Future[Answer]:
        self._request_id, self.pod, self.interrupted = request_id, None, False
        self._silence_s, self._heard_at = silence_s, self._loop.time()
        self._timer = self._loop.call_later(silence_s, self._check_silence)
        self._answer = self._loop.create_future()
        return self._answer

    def forget(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._answer = self._timer = self.pod = None
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
                is_first, self.pod = self.pod is None, reply.pod
                if is_first and self.interrupted:
                    await self.cancel(reply.pod, reply.request_id)
            case Behind() | Partial() | Done() | Refused() as body:
                self._answer.set_result(Replied(reply.request_id, reply.pod, body))

    def give_up(self, request_id: str) -> None:
        """End the wait for this request's answer, if it still goes on."""
        if request_id == self._request_id and self._answer and not self._answer.done():
            self._answer.set_result(Unanswered(request_id, "silence"))

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


def _not_below(answer: Answer, min_version: int) -> Answer:
    """Refuse an answer with tokens of versions that the request ruled out."""
    if not isinstance(answer, Replied) or not isinstance(answer.body, Partial | Done):
        return answer
    if all(span.version >= min_version for span in answer.body.sampled.spans):
        return answer
    refused = Refused(reason=f"answered below version {min_version}", retryable=True)
    return Replied(answer.request_id, answer.pod, refused)
