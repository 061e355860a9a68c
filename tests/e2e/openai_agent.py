"""One conversation twice: by an agent written for the openai SDK, and as an environment."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import openai

from services.env_agents.tool_environment import ToolEnvironment
from shared.wire.messages import TaskRef

QUESTIONS = ("How many kettles are there?", "And lamps?", "Thank you. In all?")
SCHEMA: Any = {
    "type": "function",
    "function": {
        "name": "stock",
        "description": "Return how many of an item are in stock.",
        "parameters": {
            "type": "object",
            "properties": {"item": {"type": "string"}},
            "required": ["item"],
        },
    },
}


def play(base_url: str, api_key: str, task: dict[str, Any]) -> float:
    """The agent: nothing in it knows of training but its reward."""
    client = openai.OpenAI(base_url=base_url, api_key=api_key)
    messages: list[Any] = [{"role": "user", "content": f"{task['index']}: {QUESTIONS[0]}"}]
    said = ""
    for question in (*QUESTIONS[1:], None):
        completion = client.chat.completions.create(
            model="gpt-4o", messages=messages, tools=[SCHEMA], temperature=0.2
        )
        message = completion.choices[0].message
        messages.append(message.model_dump(exclude_none=True))
        said += message.content or ""
        for call in message.tool_calls or ():
            result = json.dumps({"called": call.id})
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
        if question:
            messages.append({"role": "user", "content": question})
    return reward(said)


class Native(ToolEnvironment):
    """The same conversation, the loop being the environment's."""

    def start(self, task: TaskRef) -> Sequence[Mapping[str, Any]]:
        self.said = ""
        self.left = list(QUESTIONS[1:])
        return [{"role": "user", "content": f"{task.index}: {QUESTIONS[0]}"}]

    def tools(self) -> Sequence[Callable[..., Any]]:
        def stock(item: str) -> int:
            """Return how many of an item are in stock."""
            return len(item)

        return (stock,)

    def reply(self, content: str) -> str | None:
        self.said += content
        return self.left.pop(0) if self.left else None

    def reward(self) -> Mapping[str, float]:
        return {"task": reward(self.said)}


def reward(said: str) -> float:
    """Something that a random policy gets right now and then."""
    return float(said.count("e") >= 6)
