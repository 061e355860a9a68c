"""One NATS connection: a single wildcard inbox, requests with bounds, loud errors, reconnects.

The only module that imports `nats`. What nats-py does not do and services need: a request in
flight fails at once when the connection drops, a denied publish fails its request, and nothing
waits on `flush` (a pong that arrives after its bound ends nats-py's reader for good).
"""

from __future__ import annotations

import asyncio
import random
import re
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, cast

import nats.errors
from nats.aio.client import Client, Server
from nats.aio.msg import Msg as Msg
from nats.aio.subscription import Subscription as NatsSubscription

from shared.runtime.errors import BusUnavailable, Denied, PayloadTooLarge
from shared.runtime.logs import Log
from shared.runtime.nats_access import Access
from shared.runtime.pending_requests import Answer, AttemptFailed, PendingRequests

RECONNECT_FIRST_S = 0.05
RECONNECT_MAX_S = 2.0
PING_INTERVAL_S = 5
"""Two unanswered pings mean a dead connection (a frozen server, a cut network)."""
CLOSE_BOUND_S = 3.0
SILENT_ERROR_S = 5.0
"""A repeated connection error is logged once in so many seconds."""

STALE_S = 2.0
"""A lost connection whose socket has not closed by then is aborted."""

_SEND_ERRORS = (nats.errors.Error, OSError, RuntimeError)
"""What a publish may raise on a broken connection; uvloop: RuntimeError on a closed handle."""

_DENIED = re.compile(r'permissions violation for (publish|subscription) to "([^"]+)"')


@dataclass(frozen=True, slots=True)
class Delivered:
    """A subscription for what a consumer delivers."""

    inbox: str
    subscription: NatsSubscription


OnMessage = Callable[[Msg], Awaitable[None] | None]


class NatsLink:
    """A connection that outlives its server; build it with `open_link`."""

    def __init__(self, name: str, log: Log, *, attempt_s: float, retry_s: float) -> None:
        self.client = Client()
        self.counters: Counter[str] = Counter()
        self.attempt_s = attempt_s
        self.retry_s = retry_s
        self._name = name
        self._log = log
        self.prefix = f"_INBOX.{name}.{uuid.uuid4().hex[:16]}."
        """Of every inbox of this connection, so that permissions can be granted per service."""
        self._next_token = 0
        self._handlers: dict[str, OnMessage] = {}
        self._requests = PendingRequests()
        self._up = asyncio.Event()
        self._down_since = time.monotonic()
        self._closing = False
        self._dead = ""
        self._quiet_until = 0.0
        self._denied: dict[str, str] = {}
        self.on_down: set[Callable[[], None]] = set()
        """Called at every disconnect: what was asked of the server before it is void."""

    @property
    def connected(self) -> bool:
        return self._up.is_set() and self.client.is_connected

    @property
    def down_for_s(self) -> float:
        """Seconds since the connection was lost; 0 while it stands."""
        return 0.0 if self._up.is_set() else time.monotonic() - self._down_since

    # --- life cycle
    async def open(self, servers: list[str], timeout_s: float, access: Access = Access()) -> None:
        """Connect.

        Raises:
            BusUnavailable: nobody answered within `timeout_s`.
        """
        try:
            async with asyncio.timeout(timeout_s):
                await self.client.connect(
                    servers=servers,
                    name=self._name,
                    error_cb=self._on_error,
                    disconnected_cb=self._on_disconnected,
                    reconnected_cb=self._on_reconnected,
                    closed_cb=self._on_closed,
                    connect_timeout=2,
                    reconnect_time_wait=cast(int, 0.1),
                    max_reconnect_attempts=-1,
                    reconnect_to_server_handler=_next_server,
                    ping_interval=PING_INTERVAL_S,
                    max_outstanding_pings=2,
                    pending_size=16 * 1024 * 1024,
                    skip_subject_validation=True,
                    **access.options(),
                )
                self._up.set()
                await self.client.subscribe(
                    self.prefix + "*",
                    cb=self._on_inbox,
                    pending_msgs_limit=0,
                    pending_bytes_limit=0,
                )
                await self.barrier(self.prefix)
        except (TimeoutError, nats.errors.Error, OSError, AttemptFailed) as error:
            self._closing = True
            problem = str(self.client.last_error or error) or "no answer"
            await self._close_client()
            raise BusUnavailable(
                f"no NATS at {', '.join(servers)} within {timeout_s:g} s ({problem}): start a "
                "nats-server with JetStream there, or set bus.url"
            ) from error

    async def close(self) -> None:
        """Let what was published reach the server, then disconnect; bounded."""
        if self._closing:
            return
        self._closing = True
        try:
            if self.connected:
                await self._echo(CLOSE_BOUND_S / 2)
        except AttemptFailed:
            self._log.warning("bus_close_unflushed")
        await self._close_client()
        self._up.clear()
        self._requests.fail(AttemptFailed("the bus is closed"))

    async def _close_client(self) -> None:
        try:
            async with asyncio.timeout(CLOSE_BOUND_S / 2):
                await self.client.close()
        except (TimeoutError, nats.errors.Error, OSError) as error:
            self._log.warning("bus_close_incomplete", error=repr(error))

    async def until_up(self, deadline: float | None = None) -> None:
        """Wait for a connection, at most until `deadline` (monotonic; default: the retry bound).

        Raises:
            BusUnavailable: none by then.
        """
        if self._up.is_set():
            return
        if self._dead or self._closing:
            raise self.unavailable(self._dead or "the bus is closed")
        bound = self._down_since + self.retry_s if deadline is None else deadline
        try:
            async with asyncio.timeout(max(0.0, bound - time.monotonic())):
                await self._up.wait()
        except TimeoutError:
            raise self.unavailable("no connection") from None

    def unavailable(self, problem: str) -> BusUnavailable:
        """Build the error of an operation that used up its bound."""
        return BusUnavailable(f"bus: {problem} (retried for {self.retry_s:g} s, bus.retry_s)")

    # --- inboxes
    def new_inbox(self) -> str:
        self._next_token += 1
        return f"{self.prefix}{self._next_token:x}"

    def attach(self, inbox: str, handler: OnMessage) -> None:
        """Hand every message to `inbox` to `handler`."""
        self._handlers[inbox] = handler

    def detach(self, inbox: str) -> None:
        self._handlers.pop(inbox, None)

    async def deliver(self, handler: OnMessage, *, several: bool = False) -> Delivered:
        """Open a subscription of its own for what a consumer delivers.

        JetStream keeps the stored subject on a delivered message, so it cannot be told apart by
        inbox. `several`: the inbox ends in a wildcard, one level below `Delivered.inbox`.
        """
        inbox = f"{self.new_inbox()}.d"  # a level deeper than the wildcard inbox hears

        async def receive(msg: Msg) -> None:
            result = handler(msg)
            if result is not None:
                await result

        subscription = await self.client.subscribe(
            f"{inbox}.*" if several else inbox,
            cb=receive,
            pending_msgs_limit=0,
            pending_bytes_limit=0,
        )
        return Delivered(inbox, subscription)

    # --- sending
    async def send(
        self, subject: str, payload: bytes, reply: str = "", headers: dict[str, str] | None = None
    ) -> None:
        """Publish without an answer. Dropped, and counted, while there is no connection."""
        if not self._up.is_set():
            self.counters["core_dropped"] += 1
            return
        try:
            await self.client.publish(subject, payload, reply, headers)
        except nats.errors.MaxPayloadError:
            raise PayloadTooLarge(subject, len(payload), self.client.max_payload) from None
        except _SEND_ERRORS as error:
            self.counters["core_dropped"] += 1
            self._log.warning("publish_dropped", subject=subject, error=repr(error))

    async def attempt(
        self,
        subject: str,
        payload: bytes,
        headers: dict[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> Answer:
        """Send one request and wait for its answer.

        Raises:
            AttemptFailed: none within `timeout_s`, or the connection dropped.
            Denied: the server refuses the subject to this user.
            PayloadTooLarge: above the server's max_payload.
        """
        if not self._up.is_set():
            raise AttemptFailed("not connected")
        inbox = self.new_inbox()
        future = self._requests.expect(inbox, subject)
        try:
            await self.client.publish(subject, payload, inbox, headers)
            async with asyncio.timeout(timeout_s or self.attempt_s):
                return await future
        except TimeoutError:
            raise AttemptFailed(f"{subject}: no answer") from None
        except nats.errors.MaxPayloadError:
            raise PayloadTooLarge(subject, len(payload), self.client.max_payload) from None
        except _SEND_ERRORS as error:
            raise AttemptFailed(f"{subject}: {error!r}") from error
        finally:
            self._requests.forget(inbox)

    async def barrier(self, subject: str) -> None:
        """Wait until the server has processed everything sent before, and refused what it refuses.

        Raises:
            Denied: the subscription to `subject` was refused.
            AttemptFailed: no answer.
        """
        await self._echo(self.attempt_s)
        if subject.lower() in self._denied:
            raise Denied(self._denied[subject.lower()])

    async def _echo(self, timeout_s: float) -> None:
        inbox = self.new_inbox()
        future = self._requests.expect(inbox, inbox)
        try:
            await self.client.publish(inbox, b"")
            async with asyncio.timeout(timeout_s):
                await future
        except (TimeoutError, *_SEND_ERRORS) as error:
            raise AttemptFailed(f"no echo: {error!r}") from error
        finally:
            self._requests.forget(inbox)

    async def subscribe(
        self, subject: str, queue: str, handler: Callable[[Msg], Awaitable[None]]
    ) -> NatsSubscription:
        """Subscribe and wait until the server knows.

        Raises:
            Denied: the server refuses the subject to this user.
        """
        self._denied.pop(subject.lower(), None)
        subscription = await self.client.subscribe(
            subject, queue=queue, cb=handler, pending_msgs_limit=0, pending_bytes_limit=0
        )
        try:
            await self.barrier(subject)
        except AttemptFailed:
            # nats-py subscribes again by itself once it is connected.
            self._log.warning("subscribed_unconfirmed", subject=subject)
        return subscription

    async def unsubscribe(self, subscription: NatsSubscription) -> None:
        """End a subscription; harmless when it or the connection is gone already."""
        try:
            await subscription.unsubscribe()
        except nats.errors.Error as error:
            self._log.debug("unsubscribe", error=repr(error))

    # --- what nats-py calls
    async def _on_inbox(self, msg: Msg) -> None:
        if self._requests.answer(msg.subject, msg.headers or {}, msg.data):
            return
        handler = self._handlers.get(msg.subject)
        if handler is None:
            return
        try:
            result = handler(msg)
            if result is not None:
                await result
        except Exception as error:  # noqa: BLE001 - a handler never ends the inbox
            self.handler_failed(msg.subject, error)

    def handler_failed(self, subject: str, error: Exception) -> None:
        """Count and log what a handler raised."""
        self.counters["handler_errors"] += 1
        self._log.error("handler_failed", subject=subject, error=repr(error))

    async def _on_error(self, error: Exception) -> None:
        denied = _DENIED.search(str(error))
        if denied is not None:
            self._on_denied(denied[1], denied[2])
            return
        self.counters["connection_errors"] += 1
        if not self.client.is_connected:
            asyncio.get_running_loop().call_later(STALE_S, self._abort_stale)
        now = time.monotonic()
        if now >= self._quiet_until and not self._closing:
            self._quiet_until = now + SILENT_ERROR_S
            self._log.warning("bus_error", error=repr(error))

    def _abort_stale(self) -> None:
        """Reset a socket that nats-py still waits to see closed: it waits without a bound."""
        if not self._up.is_set() or self.client.is_connected or self._closing:
            return
        transport = cast(Any, self.client)._transport
        writer = getattr(transport, "_io_writer", None)
        if writer is not None:
            self.counters["stale_connections"] += 1
            self._log.warning("bus_connection_aborted")
            writer.transport.abort()

    def _on_denied(self, act: str, subject: str) -> None:
        """A permission violation: nats-py tells nobody else. `subject` arrives in lower case."""
        message = f"the server denies this user the {act} of {subject}: grant it in its permissions"
        self.counters["denied"] += 1
        self._log.error("bus_denied", act=act, subject=subject)
        if act == "subscription":
            self._denied[subject] = message
        self._requests.fail(Denied(message), subject)

    async def _on_disconnected(self) -> None:
        if self._up.is_set():
            self._up.clear()
            self._down_since = time.monotonic()
            if not self._closing:
                self._log.warning("bus_disconnected")
        self._requests.fail(AttemptFailed("the connection dropped"))
        for callback in list(self.on_down):
            callback()

    async def _on_reconnected(self) -> None:
        self.counters["reconnects"] += 1
        self._log.info("bus_reconnected", after_s=round(self.down_for_s, 3))
        self._up.set()

    async def _on_closed(self) -> None:
        # The server ended the connection for a reason nats-py does not retry.
        if not self._closing:
            self._dead = f"the server closed the connection: {self.client.last_error}"
            self._log.error("bus_closed_by_server", error=str(self.client.last_error))


def _next_server(servers: list[Server], _info: dict[str, Any]) -> tuple[Server, float]:
    """Choose the server that failed least, after a back-off that doubles up to its bound."""
    server = min(servers, key=lambda candidate: candidate.reconnects)
    delay_s = min(RECONNECT_MAX_S, RECONNECT_FIRST_S * 2**server.reconnects)
    return server, delay_s * random.uniform(0.5, 1.0)
