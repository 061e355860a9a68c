"""Tools from Python functions, through the whole service; as exact as an SDK agent's episode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import pytest

from services.env_agents.environment import Message
from services.env_agents.tool_environment import ToolEnvironment
from services.env_agents.tools import Tool
from shared.runtime.memory_bus import MemoryBus
from shared.wire.messages import TaskRef
from shared.wire.trajectory import Failure, Trajectory
from tests.env_agents.agents import QUESTION
from tests.env_agents.chat.conversations import FAMILIES, renderer
from tests.env_agents.chat_rollout import chat_config, chat_ticket, play, scripted
from tests.env_agents.rollout_stand_in import BASE, make_config
from tests.env_agents.test_gateway import AGENTS, ENVIRONMENT, adds

CALLS = {
    "qwen3": '<tool_call>\n{"name": "add", "arguments": ARGS}\n</tool_call>',
    "llama3": '{"name": "add", "parameters": ARGS}',
    "mistral": '[TOOL_CALLS] [{"name": "add", "arguments": ARGS, "id": "abcdefghi"}]',
}
BROKEN = {
    "qwen3": '<tool_call>\n{"name": "add", "arguments": \n</tool_call>',
    "llama3": '{"name": "add", "parameters": ',
    "mistral": "[TOOL_CALLS] add(2, 3)",
}


class Calculator(ToolEnvironment):
    """One question, one tool."""

    def start(self, task: TaskRef) -> Sequence[Message]:
        self.said = ""
        return [QUESTION]

    def tools(self) -> Sequence[Callable[..., Any]]:
        def add(a: int, b: int) -> str:
            """Add two numbers."""
            return str(a + b)

        return [add]

    def reply(self, content: str) -> str | None:
        self.said = content
        return None

    def reward(self) -> dict[str, float]:
        return {"task": float("5" in self.said)}


@pytest.mark.parametrize("family", FAMILIES)
async def test_errors_of_every_kind_are_read_by_the_policy_and_it_may_try_again(
    bus: MemoryBus, family: str
) -> None:
    attempts = iter(
        [
            BROKEN[family],
            CALLS[family].replace("add", "subtract").replace("ARGS", '{"a": 2, "b": 3}'),
            CALLS[family].replace("ARGS", '{"a": 2}'),
            CALLS[family].replace("ARGS", '{"a": 2, "b": "3"}'),
            CALLS[family].replace("ARGS", '{"a": 2, "b": 3}'),
            "It is 5.",
        ]
    )
    prompts: list[str] = []

    def policy(prompt: str) -> str:
        prompts.append(prompt)
        return next(attempts)

    config = chat_config(family, f"{__name__}:Calculator")
    async with scripted(bus, family, policy):
        outcome, _ = await play(bus, config, chat_ticket())
    assert isinstance(outcome, Trajectory), outcome
    assert outcome.reward == 1.0
    assert sum(len(sequence.turns) for sequence in outcome.sequences) == 6
    for prompt, told in zip(
        prompts[1:5],
        ("Error: ", "Error: unknown tool 'subtract'", "argument 'b' is missing", "must be integer"),
        strict=True,
    ):
        # Templates that write results as JSON escape nothing in these.
        assert told in prompt


async def test_an_sdk_agents_episode_is_the_native_one_bit_for_bit(bus: MemoryBus) -> None:
    native = chat_config("qwen3", f"{__name__}:Calculator")
    agent = chat_config("qwen3", ENVIRONMENT, agent=f"{AGENTS}:calculator")
    async with scripted(bus, "qwen3", adds):
        first, _ = await play(bus, native, chat_ticket(0))
        second, _ = await play(bus, agent, chat_ticket(1))
    assert isinstance(first, Trajectory)
    assert isinstance(second, Trajectory)
    # Ids, mask, stamps, log-probs and turns: all that scoring, training and audit read.
    assert first.sequences == second.sequences
    assert (first.status, first.reward) == (second.status, second.reward)


async def test_an_environment_of_text_is_played_by_a_chat_model(bus: MemoryBus) -> None:
    config = chat_config("qwen3", "services.env_agents.tasks.frozen_lake:FrozenLake")
    async with scripted(bus, "qwen3", lambda prompt: "right"):
        outcome, _ = await play(bus, config, chat_ticket())
    assert isinstance(outcome, Trajectory)
    ids = outcome.sequences[0].token_ids.numpy().tolist()
    text = renderer("qwen3").tokenizer.decode(ids)
    assert text.startswith("<|im_start|>user\nS")
    assert "<|im_start|>assistant\nright<|im_end|>\n<|im_start|>user\n@" in text


async def test_messages_without_a_chat_renderer_fail_naming_the_renderer(bus: MemoryBus) -> None:
    config = make_config(task={"environment": f"{__name__}:Calculator"})
    assert config.model.source == BASE
    async with scripted(bus, "qwen3", lambda prompt: "x"):
        outcome, _ = await play(bus, config, chat_ticket())
    assert isinstance(outcome, Failure)
    assert "set task.renderer: services.env_agents.chat.renderer:ChatRenderer" in outcome.detail


def test_a_schema_is_the_functions_signature() -> None:
    def book(city: str, nights: int = 1, tags: list[str] | None = None, *, kind: Literal["a", "b"]):  # type: ignore[no-untyped-def]
        """Book a stay.

        More that the policy is not told.
        """

    schema = Tool.of(book).schema["function"]
    assert schema["description"] == "Book a stay."
    assert schema["parameters"] == {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "nights": {"type": "integer"},
            "tags": {"type": "array", "items": {"type": "string"}},
            "kind": {"type": "string", "enum": ["a", "b"]},
        },
        "required": ["city", "kind"],
    }
    with pytest.raises(TypeError, match="annotate its argument 'x'"):
        Tool.of(lambda x: x)
