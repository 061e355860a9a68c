"""The OpenEnv client against the real openenv-core server."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from services.env_agents.environment import EnvironmentLost
from services.env_agents.tasks.openenv_client import OpenEnvClient, OpenEnvError
from tests.real_packages.servers import serving, task


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving("openenv_server.py", "4") as (port, _):
        yield f"http://127.0.0.1:{port}"


async def test_an_episode_is_played_to_its_end_in_one_session(url: str) -> None:
    client = OpenEnvClient({"url": url, "text": "hint", "reset": {"below": 10}})
    assert (await client.reset(task(3))).text == "a number below 10\n"
    rewards: list[float] = []
    for number in range(10):
        result = await client.step(f'<think>?</think>{{"number": {number}}}<|im_end|>')
        rewards.append(result.reward)
        if result.terminated:
            break
        assert result.observation.text == "higher\n"
    await client.close()
    assert rewards == [-0.1] * (len(rewards) - 1) + [1.0]


async def test_the_task_determines_the_episode(url: str) -> None:
    async def length(index: int) -> tuple[int, str]:
        client = OpenEnvClient({"url": url, "action": {"number": "{answer}"}})
        await client.reset(task(index))
        try:
            for turn in range(10):
                if (await client.step(str(turn))).terminated:
                    return turn, client.task_digest()
        finally:
            await client.close()
        raise AssertionError("unreachable")

    assert await length(0) == await length(0)
    assert len({await length(index) for index in range(6)}) > 3


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ("no json", "Error: the answer is no JSON"),
        ("[1]", "Error: the answer is no JSON object"),
        ('{"number": "x"}', "Error: Invalid message: number: Input should be a valid integer"),
    ],
)
async def test_a_malformed_action_is_told_to_the_policy(url: str, answer: str, told: str) -> None:
    client = OpenEnvClient({"url": url})
    await client.reset(task())
    result = await client.step(answer)
    assert told in result.observation.text
    assert (result.rewards, result.reward, result.terminated) == ({"malformed": 1.0}, 0.0, False)
    assert (await client.step('{"number": 0}')).observation.text.startswith('{"hint"')
    await client.close()


async def test_an_environment_that_raises_on_the_server_is_an_error_by_name(url: str) -> None:
    client = OpenEnvClient({"url": url})
    await client.reset(task())
    with pytest.raises(OpenEnvError, match="EXECUTION_ERROR: the environment failed"):
        await client.step('{"number": 500}')
    await client.close()


async def test_a_full_server_is_an_error_by_name(url: str) -> None:
    clients = [OpenEnvClient({"url": url}) for _ in range(5)]
    async with asyncio.timeout(30):
        for client in clients[:4]:
            await client.reset(task())
        with pytest.raises(OpenEnvError, match="CAPACITY_REACHED"):
            await clients[4].reset(task())
        for client in clients:
            await client.close()


async def test_a_server_that_dies_in_mid_episode_is_a_lost_environment() -> None:
    with serving("openenv_server.py", "4") as (port, process):
        client = OpenEnvClient({"url": f"http://127.0.0.1:{port}"})
        await client.reset(task())
        with pytest.raises(EnvironmentLost, match="hung up"):
            await client.step('{"number": 666}')
        await client.close()
        assert process.wait(10) == 9
        with pytest.raises(EnvironmentLost, match=f"ws://127.0.0.1:{port}/ws: ConnectionRefused"):
            await OpenEnvClient({"url": f"http://127.0.0.1:{port}"}).reset(task())
