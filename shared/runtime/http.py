"""`/metrics` and three probes: a small HTTP server in a thread of its own.

`/startupz` turns 200 once the service has been ready and stays so; `/healthz` says whether the
event loop runs; `/readyz` whether the service can do its work now.

A thread, so that a stuck event loop can be told from a busy one: it answers even then.
"""

from __future__ import annotations

import errno
import socket
import socketserver
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from shared.runtime.errors import ConfigError


class Pulse:
    """When the event loop last ran."""

    def __init__(self, stall_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._stall_s = stall_s
        self._clock = clock
        self._beaten_at = clock()

    def beat(self) -> None:
        """Say that the loop runs."""
        self._beaten_at = self._clock()

    def problem(self) -> str:
        """Empty while alive; else what is wrong."""
        silent_s = self._clock() - self._beaten_at
        if silent_s <= self._stall_s:
            return ""
        return f"the event loop has not run for {silent_s:.0f} s"


Answer = tuple[int, str, bytes]
"""Status, content type, body."""


def respond(
    path: str, alive_problem: str, ready_problem: str, metrics: Callable[[], bytes],
    *, started: bool = False,
) -> Answer:  # fmt: skip
    """Answer one GET; `started`: whether it has ever been ready."""
    text = "text/plain; charset=utf-8"
    match path.partition("?")[0]:
        case "/startupz":
            return _probe("" if started else ready_problem or alive_problem, text)
        case "/healthz":
            return _probe(alive_problem, text)
        case "/readyz":
            return _probe(alive_problem or ready_problem, text)
        case "/metrics":
            return 200, CONTENT_TYPE_LATEST, metrics()
        case _:
            return 404, text, b"/metrics /startupz /healthz /readyz\n"


def _probe(problem: str, content_type: str) -> Answer:
    if problem:
        return 503, content_type, f"{problem}\n".encode()
    return 200, content_type, b"ok\n"


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], answer: Callable[[str], Answer]) -> None:
        self.answer = answer
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        # HTTPServer would look the host's name up in the DNS, which may hang.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]


class _Handler(BaseHTTPRequestHandler):
    timeout = 10  # a client that says nothing does not keep a thread

    def do_GET(self) -> None:
        assert isinstance(self.server, _Server)
        status, content_type, body = self.server.answer(self.path)
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Probes come every few seconds: nothing worth a line."""


class HttpServer:
    """The running server; `port` is the one it got.

    Raises:
        ConfigError: the address cannot be bound, with the port named.
    """

    def __init__(
        self,
        host: str,
        port: int,
        registry: CollectorRegistry,
        pulse: Pulse,
        ready_problem: Callable[[], str],
    ) -> None:
        started = False

        def answer(path: str) -> Answer:
            nonlocal started
            problem = ready_problem()
            started = started or not problem
            return respond(
                path, pulse.problem(), problem, lambda: generate_latest(registry), started=started
            )

        try:
            self._server = _Server((host, port), answer)
        except OSError as error:
            what = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be used: {error}"
            raise ConfigError(
                f"telemetry.port {port} on {host} {what}; choose another, or 0 for any free port"
            ) from error
        self.port = int(self._server.server_port)
        self._thread = threading.Thread(
            target=self._server.serve_forever, name="http", daemon=True, args=(0.2,)
        )
        self._thread.start()

    def close(self) -> None:
        """Stop answering."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=2)
