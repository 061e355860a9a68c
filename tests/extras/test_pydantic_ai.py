"""An agent written with Pydantic AI, unmodified, through the whole service (make test-agents)."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from openai import AsyncOpenAI
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

from shared.runtime.memory_bus import MemoryBus
from shared.runtime.memory_server import MemoryServer
from shared.wire.trajectory import Trajectory
from tests.env_agents.chat_rollout import chat_config, chat_ticket, play, scripted
from tests.env_agents.rollout_stand_in import SUBJECTS

CALL = '<tool_call>\n{"name": "order_status", "arguments": {"order_id": "W1"}}\n</tool_call>'


@pytest.fixture
async def bus() -> AsyncIterator[MemoryBus]:
    client = MemoryBus(SUBJECTS, MemoryServer(), name="test")
    await client.create_streams()
    yield client
    await client.close()


async def shop_agent(base_url: str, api_key: str, task: dict[str, Any]) -> float:
    """As in the framework's documentation; only the endpoint is ours."""
    client = AsyncOpenAI(base_url=base_url, api_key=api_key)
    provider = OpenAIProvider(openai_client=client)
    agent = Agent(OpenAIChatModel("policy", provider=provider), instructions="Help the user.")

    @agent.tool_plain
    def order_status(order_id: str) -> str:
        """Return the status of an order."""
        return f"{order_id} is pending"

    result = await agent.run("Where is my order W1?")
    follow_up = await agent.run("Are you sure?", message_history=result.all_messages())
    await client.close()
    return float("pending" in result.output and "Yes" in follow_up.output)


async def test_its_tool_loop_and_its_second_run_are_recorded_as_one_sequence(
    bus: MemoryBus,
) -> None:
    def policy(prompt: str) -> str:
        if "Are you sure?" in prompt:
            return "Yes."
        return "It is pending." if "<tool_response>" in prompt else CALL

    config = chat_config(
        "qwen3",
        "services.env_agents.gateway.environment:AgentEnvironment",
        agent="tests.extras.test_pydantic_ai:shop_agent",
    )
    async with scripted(bus, "qwen3", policy):
        outcome, _ = await play(bus, config, chat_ticket(), timeout_s=60)
    assert isinstance(outcome, Trajectory), outcome
    assert outcome.reward == 1.0
    (sequence,) = outcome.sequences
    assert len(sequence.turns) == 3
