"""A small HTTP/1.1 server on asyncio and h11: one handler, bounded bodies, streamed responses."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass

import h11

from shared.runtime.errors import ConfigError

MAX_BODY_BYTES = 64 << 20
_READ_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Request:
    """A request whose body has arrived."""

    method: str
    path: str
    """Without the query."""
    headers: Mapping[str, str]
    """Names in lower case."""
    body: bytes


@dataclass(frozen=True, slots=True)
class Response:
    """What goes back: a body, or a stream of pieces."""

    status: int
    body: bytes = b""
    content_type: str = "application/json"
    stream: AsyncIterator[bytes] | None = None


Handler = Callable[[Request], Awaitable[Response]]


class HttpServer:
    """Serves until closed; `port` is the one it got."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self.port = 0

    async def start(self, host: str, port: int) -> None:
        """Listen.

        Raises:
            ConfigError: the address cannot be bound.
        """
        try:
            self._server = await asyncio.start_server(self._accept, host, port)
        except OSError as error:
            raise ConfigError(
                f"gateway {host}:{port} cannot be used: {error}; choose another port, or 0"
            ) from error
        self.port = int(self._server.sockets[0].getsockname()[1])

    async def close(self) -> None:
        """Stop listening and end all connections."""
        if self._server is not None:
            self._server.close()
        for task in list(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            await self._serve(reader, writer)
        except (ConnectionError, h11.ProtocolError):
            pass  # the client is gone, or speaks something else: nobody to tell
        except asyncio.CancelledError:
            # By close(): asyncio would report a cancelled connection as an error.
            pass
        finally:
            self._connections.discard(task)
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = h11.Connection(h11.SERVER)
        while (request := await _read(connection, reader, writer)) is not None:
            answer = await self._handler(request)
            await _write(connection, writer, answer)
            if connection.our_state is h11.MUST_CLOSE:
                return
            connection.start_next_cycle()


async def _read(
    connection: h11.Connection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> Request | None:
    """Return the next request, None when the client has hung up."""
    head: h11.Request | None = None
    body = bytearray()
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            if connection.they_are_waiting_for_100_continue:
                informational = h11.InformationalResponse(status_code=100, headers=[])
                writer.write(connection.send(informational) or b"")
            connection.receive_data(await reader.read(_READ_BYTES))
        elif isinstance(event, h11.Request):
            head = event
        elif isinstance(event, h11.Data):
            body += event.data
            if len(body) > MAX_BODY_BYTES:
                raise h11.RemoteProtocolError("body too large", error_status_hint=413)
        elif isinstance(event, h11.EndOfMessage):
            assert head is not None
            headers = {name.decode(): value.decode("latin-1") for name, value in head.headers}
            path = head.target.decode().partition("?")[0]
            return Request(head.method.decode(), path, headers, bytes(body))
        else:
            return None


async def _write(
    connection: h11.Connection, writer: asyncio.StreamWriter, answer: Response
) -> None:
    headers = [("Content-Type", answer.content_type)]
    if answer.stream is None:
        headers.append(("Content-Length", str(len(answer.body))))
    head = h11.Response(status_code=answer.status, headers=headers)
    writer.write(connection.send(head) or b"")
    if answer.stream is None:
        writer.write(connection.send(h11.Data(data=answer.body)) or b"")
    else:
        async for piece in answer.stream:
            writer.write(connection.send(h11.Data(data=piece)) or b"")
            await writer.drain()
    writer.write(connection.send(h11.EndOfMessage()) or b"")
    await writer.drain()
