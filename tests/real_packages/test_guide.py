"""The OpenEnv guide of docs/train_your_agent.md: its server, played with its options."""

from __future__ import annotations

import sys
from pathlib import Path

import yaml

from services.env_agents.tasks.openenv_client import OpenEnvClient
from tests.e2e.guides import files
from tests.real_packages.servers import free_port, running, task

PORT = "8765"


async def test_the_server_of_the_guide_is_played_with_the_options_of_the_guide(
    tmp_path: Path,
) -> None:
    port, written = free_port(), files()
    (tmp_path / "my_server.py").write_text(written["my_server.py"].replace(PORT, str(port)))
    values = yaml.safe_load(written["my_server.yaml"].replace(PORT, str(port)))
    with running([sys.executable, "my_server.py"], port, tmp_path):
        client = OpenEnvClient(values["config"]["task"]["options"])
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
