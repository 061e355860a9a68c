"""The OpenEnv guide of docs/train_your_agent.md: its server, played with its options."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path

import yaml

from services.env_agents.tasks.openenv_client import OpenEnvClient
from tests.e2e.guides import files
from tests.real_packages.servers import task

PORT = "8765"


async def test_the_server_of_the_guide_is_played_with_the_options_of_the_guide(
    tmp_path: Path,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    written = files()
    (tmp_path / "my_server.py").write_text(written["my_server.py"].replace(PORT, port))
    options = yaml.safe_load(written["my_server.yaml"].replace(PORT, port))["config"]["task"]
    server = _start(tmp_path)
    try:
        _wait(int(port), server)
        client = OpenEnvClient(options["options"])
        assert "below 10" in (await client.reset(task(3))).text
        rewards: list[float] = []
        for number in range(10):
            result = await client.step(f"{number}<|im_end|>")
            rewards.append(result.reward)
            if result.terminated:
                break
            assert result.observation.text == "higher\n"
        assert rewards[-1] == 1.0
        await client.close()
    finally:
        server.kill()
        server.wait()


def _start(folder: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "my_server.py"], cwd=folder)


def _wait(port: int, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert server.poll() is None, "the server ended while starting"
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise TimeoutError("the server did not start")
