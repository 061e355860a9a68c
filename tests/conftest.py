"""Fixtures of the whole suite: a real nats-server that can be killed, and the in-memory bus."""

from __future__ import annotations

import os
import signal
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from shared.runtime import nats_server as server_module
from shared.runtime.memory_bus import MemoryBus
from shared.wire.subjects import Subjects

# A busy machine is slow to draw examples; the per-test timeout bounds a hang.
settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")


class RunningServer:
    """A nats-server on a free port, JetStream on files in `folder`."""

    def __init__(self, folder: Path, extra: str = "") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._config = folder / "nats.conf"
        self._log = folder / "nats.log"
        self.port = server_module.free_port()
        self.url = f"nats://127.0.0.1:{self.port}"
        server_module.write_config(
            self._config, port=self.port, store_dir=folder / "store", extra=extra
        )
        self.start()

    def start(self) -> None:
        """Start (again) on the same port and store, and wait until healthy."""
        self._process = server_module.start(self._config, self._log)
        server_module.wait_healthy(self.url, 20, self._process)

    def kill(self) -> None:
        """Kill -9."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait(timeout=10)

    def freeze(self) -> None:
        """SIGSTOP: connections stay open, nothing answers."""
        self._process.send_signal(signal.SIGSTOP)
        os.waitpid(self._process.pid, os.WUNTRACED)  # it has stopped, not only been told to

    def thaw(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        if self._process.poll() is None:
            self._process.terminate()
        self._process.wait(timeout=10)


@pytest.fixture(scope="session")
def nats_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """One server for the session: use a run name of your own, and do not kill it."""
    server = RunningServer(tmp_path_factory.mktemp("nats"))
    yield server
    server.stop()


@pytest.fixture
def mortal_nats_server(tmp_path: Path) -> Iterator[RunningServer]:
    """A server of the test's own, to kill and to restart."""
    server = RunningServer(tmp_path / "nats")
    yield server
    server.stop()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """torch on one thread, as the services run: sums have one order."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def subjects() -> Subjects:
    """Names of a run that no other test uses."""
    return Subjects(f"t{uuid.uuid4().hex[:12]}")


@pytest.fixture
async def memory_bus(subjects: Subjects) -> AsyncIterator[MemoryBus]:
    """An in-memory bus with its streams; `MemoryBus(subjects, bus.server)` joins it."""
    bus = MemoryBus(subjects)
    await bus.create_streams()
    yield bus
    await bus.close()
