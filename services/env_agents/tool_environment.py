"""An environment from Python functions: what most agents need, in one class to inherit from.

A subclass names its tools, opens the conversation, answers what the policy says, and gives the
reward at the end. The rest is here: calls made and answered, whatever is wrong with a call given
back as an observation, turns counted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from services.env_agents.answer import Answer, ToolCall
from services.env_agents.environment import Message, Observation, StepResult
from services.env_agents.tools import Toolbox, ToolFault
from shared.wire.messages import TaskRef


class ToolEnvironment:
    """Satisfies `Environment` and `ActsOnAnswers`.

    Args:
        options: `task.options`, for the subclass.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = options
        self._toolbox = Toolbox([])
        self._digest = ""

    # --- for the subclass
    def tools(self) -> Sequence[Callable[..., Any]]:
        """Functions that the policy may call; a `ToolFault` they raise is shown to it."""
        return ()

    def start(self, task: TaskRef) -> Sequence[Message]:
        """Open the conversation."""
        raise NotImplementedError

    def reply(self, content: str) -> str | None:
        """Answer what the policy said without calling a tool; None ends the episode."""
        del content
        return None

    def reward(self) -> Mapping[str, float]:
        """Parts of the reward at the end, by name; their sum is the episode's."""
        raise NotImplementedError

    # --- Environment
    async def reset(self, task: TaskRef) -> Observation:
        messages = tuple(self.start(task))
        self._toolbox = Toolbox(self.tools())
        content = json.dumps([list(messages), task.payload], sort_keys=True, default=str)
        self._digest = hashlib.blake2b(content.encode(), digest_size=8).hexdigest()
        return Observation(messages=messages, tools=self._toolbox.schemas)

    async def act(self, answer: Answer) -> StepResult:
        if answer.errors:
            # There is no call that a tool's message could answer.
            text = "\n".join(f"Error: {error}" for error in answer.errors)
            return StepResult(Observation(messages=({"role": "user", "content": text},)))
        if answer.tool_calls:
            results = [await self._call(call) for call in answer.tool_calls]
            return StepResult(Observation(messages=tuple(results)))
        said = self.reply(answer.content)
        if said is None:
            parts = dict(self.reward())
            return StepResult(
                Observation(), reward=sum(parts.values()), terminated=True, rewards=parts
            )
        return StepResult(Observation(messages=({"role": "user", "content": said},)))

    async def step(self, answer: str) -> StepResult:
        """Without a chat renderer there are no tool calls to read."""
        del answer
        raise TypeError(
            f"{type(self).__name__} reads tool calls: set task.renderer: "
            "services.env_agents.chat.renderer:ChatRenderer"
        )

    def task_digest(self) -> str:
        return self._digest

    async def close(self) -> None:
        pass

    async def _call(self, call: ToolCall) -> Message:
        try:
            content = await self._toolbox.call(call)
        except ToolFault as fault:
            content = f"Error: {fault}"
        return {"role": "tool", "tool_call_id": call.id, "name": call.name, "content": content}
