"""Episodes behind one endpoint: each has a key, and its requests are answered one after another.

A request waits in its session until the episode takes it as an observation, and is answered with
what the policy sampled. A retry of the client (same body, its retry count raised) is given the
answer of the first attempt: nothing is sampled twice because a connection broke.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from services.env_agents.answer import Answer
from services.env_agents.gateway import protocol
from services.env_agents.gateway.http import HttpServer, Request, Response
from services.env_agents.gateway.protocol import Asked, BadRequest

PATHS = ("/v1/chat/completions", "/v1/completions")


class SessionOver(Exception):
    """The episode ended before the request was answered."""


@dataclass(eq=False)
class Exchange:
    """One request and, once sampled, its answer."""

    asked: Asked
    number: int
    answer: asyncio.Future[Answer]


@dataclass(eq=False)
class Session:
    """One episode's side of the endpoint."""

    key: str
    waiting: asyncio.Queue[Exchange] = field(default_factory=asyncio.Queue[Exchange])
    counts: Counter[str] = field(default_factory=Counter[str])
    """What was ignored in requests, by name."""
    _exchanges: dict[str, Exchange] = field(default_factory=dict[str, Exchange])
    """By digest of the request."""
    _num_requests: int = 0
    _is_over: bool = False

    async def ask(self, asked: Asked, digest: str, *, is_retry: bool) -> Exchange:
        """Wait for the answer to a request.

        Raises:
            SessionOver: there will be none.
        """
        exchange = self._exchanges.get(digest) if is_retry else None
        if exchange is None:
            if self._is_over:
                raise SessionOver("the episode of this key is over")
            self.counts.update(asked.ignored)
            self._num_requests += 1
            future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
            exchange = Exchange(asked, self._num_requests, future)
            self._exchanges[digest] = exchange
            self.waiting.put_nowait(exchange)
        # Shielded: a client that hangs up does not take the answer from its retry.
        await asyncio.shield(exchange.answer)
        return exchange

    def close(self) -> None:
        """Refuse what is not answered."""
        self._is_over = True
        for exchange in self._exchanges.values():
            if not exchange.answer.done():
                exchange.answer.set_exception(SessionOver("the episode of this key is over"))
                # Nobody may be waiting any more.
                exchange.answer.exception()


class Gateway:
    """The endpoint of one process: listens while there are sessions."""

    def __init__(self, host: str = "127.0.0.1", port: int = 0, model_id: str = "policy") -> None:
        self._host = host
        self._port = port
        self._model_id = model_id
        self._sessions: dict[str, Session] = {}
        self._server: HttpServer | None = None
        self._changing = asyncio.Lock()

    async def open(self) -> Session:
        """Return a new session with a key of its own.

        Raises:
            ConfigError: the address cannot be bound.
        """
        async with self._changing:
            if self._server is None:
                server = HttpServer(self._handle)
                await server.start(self._host, self._port)
                self._server = server
            session = Session(f"lw-{secrets.token_hex(16)}")
            self._sessions[session.key] = session
            return session

    async def close(self, session: Session) -> None:
        """End a session: its key is worth nothing from here on."""
        session.close()
        async with self._changing:
            self._sessions.pop(session.key, None)
            if not self._sessions and self._server is not None:
                await self._server.close()
                self._server = None

    @property
    def base_url(self) -> str:
        """What an OpenAI client is given."""
        assert self._server is not None, "no session is open"
        return f"http://{self._host}:{self._server.port}/v1"

    async def _handle(self, request: Request) -> Response:
        key = request.headers.get("authorization", "").removeprefix("Bearer ")
        session = self._sessions.get(key)
        if session is None:
            return _refused(401, "unknown key: its episode is over, or none", "invalid_api_key")
        if request.method == "GET" and request.path == "/v1/models":
            model = {"id": self._model_id, "object": "model", "created": 0, "owned_by": "lagwise"}
            return Response(200, json.dumps({"object": "list", "data": [model]}).encode())
        if request.method != "POST" or request.path not in PATHS:
            known = ", ".join((*PATHS, "/v1/models"))
            return _refused(404, f"{request.method} {request.path}: there are {known}", "not_found")
        try:
            asked = protocol.parse(request.path, request.body)
        except BadRequest as error:
            return _refused(400, str(error), "invalid_request_error")
        digest = hashlib.blake2b(request.path.encode() + request.body, digest_size=16).hexdigest()
        retries = request.headers.get("x-stainless-retry-count", "0")
        try:
            exchange = await session.ask(asked, digest, is_retry=retries not in ("", "0"))
        except SessionOver as error:
            return _refused(410, str(error), "episode_over")
        return _answered(asked, exchange)


def _answered(asked: Asked, exchange: Exchange) -> Response:
    answer, created = exchange.answer.result(), int(time.time())
    if not asked.stream:
        whole = protocol.response(asked, answer, exchange.number, created)
        return Response(200, json.dumps(whole).encode())

    async def events() -> AsyncIterator[bytes]:
        for chunk in protocol.chunks(asked, answer, exchange.number, created):
            yield b"data: " + json.dumps(chunk).encode() + b"\n\n"
        yield b"data: [DONE]\n\n"

    return Response(200, content_type="text/event-stream", stream=events())


def _refused(status: int, message: str, kind: str) -> Response:
    return Response(status, protocol.error_body(message, kind))
