"""Servers on free ports, and tasks."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shared.wire.messages import TaskRef

FOLDER = Path(__file__).parent


def task(index: int = 0, split: str = "train", seed: int = 1, **payload: object) -> TaskRef:
    return TaskRef(dataset="d", split=split, index=index, seed=seed, payload=payload)


@contextmanager
def serving(script: str, *arguments: str) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """A server script of this folder on a free port, until the end of the block."""
    port = free_port()
    command = [sys.executable, str(FOLDER / script), str(port), *arguments]
    with running(command, port) as process:
        yield port, process


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


@contextmanager
def running(
    command: list[str], port: int, folder: Path | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A command that serves `port`, once it does, until the end of the block."""
    process = subprocess.Popen(command, cwd=folder, stderr=subprocess.DEVNULL)
    try:
        _wait(port, process)
        yield process
    finally:
        process.kill()
        process.wait()


def _wait(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert process.poll() is None, "the server ended while starting"
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise TimeoutError("the server did not start")
