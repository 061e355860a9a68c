"""Tool calls as Hermes and Qwen3 write them.

<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call>
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, cast

from services.env_agents.answers import without_thought

_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)


@dataclass(frozen=True, slots=True)
class ToolCall:
    """What the policy wants done."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True)
class MalformedCall:
    """A call that cannot be read; `problem` is told to the policy."""

    problem: str


def tool_calls(answer: str) -> list[ToolCall | MalformedCall]:
    """Return the calls of an answer in order; none: it is a final answer."""
    spoken = without_thought(answer)
    calls: list[ToolCall | MalformedCall] = [_call(text) for text in _CALL.findall(spoken)]
    if spoken.count("<tool_call>") > len(calls):
        calls.append(MalformedCall("a <tool_call> without </tool_call>"))
    return calls


def _call(text: str) -> ToolCall | MalformedCall:
    try:
        call: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        return MalformedCall(f"the tool call is no JSON: {error}")
    if not isinstance(call, dict):
        return MalformedCall("the tool call is no JSON object")
    fields = cast("dict[str, Any]", call)
    name, arguments = fields.get("name"), fields.get("arguments", {})
    if not isinstance(name, str) or not name:
        return MalformedCall("the tool call has no `name`")
    if not isinstance(arguments, dict):
        return MalformedCall(f"the arguments of {name} are no JSON object")
    return ToolCall(name, cast("dict[str, Any]", arguments))
