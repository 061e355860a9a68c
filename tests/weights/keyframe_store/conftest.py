"""Kinds of keyframe store: a folder, fsspec's memory, an S3 server."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from types import SimpleNamespace

import fsspec
import pytest

from shared.runtime.nats_server import free_port
from shared.weights.keyframe_store import KeyframeStore


@pytest.fixture(scope="session")
def s3_server() -> Iterator[dict]:
    """Options of an S3-compatible server in a process of its own, with the bucket `weights`."""
    pytest.importorskip("s3fs", reason="the s3 extra is not installed")
    pytest.importorskip("moto.server", reason="moto is not installed")
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    options = {
        "endpoint_url": f"http://127.0.0.1:{port}",
        "key": "key",
        "secret": "secret",
    }
    try:
        deadline = time.monotonic() + 30
        while not _listens(port):
            assert server.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        fsspec.filesystem("s3", **options).mkdir("weights")
        yield options
    finally:
        server.terminate()
        server.wait(timeout=10)


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


@pytest.fixture(params=["local", "memory", "s3"])
def place(request, tmp_path) -> SimpleNamespace:
    """A store and a second look at the same place: `fs`, `root`."""
    name = uuid.uuid4().hex
    options: dict = {}
    if request.param == "local":
        url = str(tmp_path / "shared" / "run")
    elif request.param == "memory":
        url = f"memory://{name}/run"
    else:
        options = request.getfixturevalue("s3_server")
        url = f"s3://weights/{name}/run"
    (fs, root) = fsspec.core.url_to_fs(url, use_listings_cache=False, **options)
    return SimpleNamespace(
        kind=request.param, store=KeyframeStore(url, options), fs=fs, root=root, url=url
    )


@pytest.fixture
def local(tmp_path) -> KeyframeStore:
    return KeyframeStore(str(tmp_path / "run"))
