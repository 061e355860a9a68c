"""A nats-server that runs the configuration rendered by the chart."""

from __future__ import annotations

import base64
import os
import re
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from shared.runtime import nats_server
from shared.runtime.logs import Log
from shared.runtime.nats_bus import NatsBus, connect
from shared.runtime.nats_permissions import INBOX_NAMES, Account
from shared.runtime.sections import BusSection
from shared.wire.subjects import Subjects

RUN = "chart-accounts"


@dataclass
class Guarded:
    """A running server whose users are the chart's."""

    url: str
    passwords: dict[str, str]
    folder: Path

    def access(self, user: str) -> BusSection:
        path = self.folder / f"{user}.password"
        path.write_text(self.passwords[user])
        return BusSection(
            url=self.url, user=user, password_file=str(path), connect_timeout_s=5,
            request_timeout_s=2, retry_s=5, max_stream_bytes=64 * 1024 * 1024,
        )  # fmt: skip


def serve(conf: str, passwords: dict[str, str], folder: Path) -> tuple[Guarded, subprocess.Popen]:
    """Start a server with a rendered configuration; only ports and the store are this machine's."""
    port = nats_server.free_port()
    text = re.sub(r"(?m)^port: 4222$", f"listen: 127.0.0.1:{port}", conf)
    text = re.sub(r"(?m)^http_port: 8222$", "", text)
    text = text.replace('"/data"', f'"{folder / "store"}"')
    path = folder / "nats.conf"
    path.write_text(text)
    environment = {f"NATS_PASSWORD_{user.upper()}": word for user, word in passwords.items()}
    with (folder / "nats.log").open("wb") as log:
        process = subprocess.Popen(
            [str(nats_server.find_binary()), "-c", str(path)],
            env={**os.environ, **environment, "POD_NAME": "nats-0"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    url = f"nats://127.0.0.1:{port}"
    nats_server.wait_healthy(url, 10, process)
    return Guarded(url, passwords, folder), process


@pytest.fixture(scope="session")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    """The server of a rendered release."""
    from tests.charts.rendering import of_kind, render

    objects = render({"config": {"run": {"name": RUN}}})
    conf = of_kind(objects, "ConfigMap", "nats")[0]["data"]["nats.conf"]
    secret = of_kind(objects, "Secret", "nats")[0]["data"]
    passwords = {user: base64.b64decode(word).decode() for user, word in secret.items()}
    server, process = serve(conf, passwords, tmp_path_factory.mktemp("guarded"))
    yield server
    process.terminate()
    process.wait(timeout=10)


Dial = Callable[[Account], Awaitable[NatsBus]]


@pytest.fixture
async def dial(guarded: Guarded) -> AsyncIterator[Dial]:
    """Connects with an account of the chart."""
    buses: list[NatsBus] = []

    async def connect_as(account: Account) -> NatsBus:
        name = INBOX_NAMES[account][0]
        bus = await connect(guarded.access(account), Subjects(RUN), name, Log(account))
        buses.append(bus)
        return bus

    yield connect_as
    for bus in buses:
        await bus.close()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write golden files anew")
