"""Chat messages: what agents send, in the one form that templates and comparisons use. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from services.env_agents.answer import Parsed

Message = dict[str, Any]


def normalised(message: Mapping[str, Any]) -> Message:
    """Return a message as templates read it: text content, arguments as objects.

    Raises:
        ValueError: no role, or content that is not text.
    """
    role = message.get("role")
    if not isinstance(role, str):
        raise ValueError(f"a message needs a string `role`, not {role!r}")
    # OpenAI's newer name of the system's role; templates know only the older one.
    made: Message = {
        "role": "system" if role == "developer" else role,
        "content": _text(role, message.get("content")),
    }
    for key in ("name", "tool_call_id", "reasoning_content"):
        if message.get(key) is not None:
            made[key] = message[key]
    if message.get("tool_calls"):
        made["tool_calls"] = [_call(call) for call in message["tool_calls"]]
    return made


def numbered(parsed: Parsed, first: int) -> Parsed:
    """Give calls without an id of their own one, numbered from `first`."""
    calls = tuple(
        replace(call, id=call.id or call_id(first + index))
        for index, call in enumerate(parsed.tool_calls)
    )
    return replace(parsed, tool_calls=calls)


def of_answer(parsed: Parsed) -> Message:
    """Return the message that an answer is."""
    made: Message = {"role": "assistant", "content": parsed.content}
    if parsed.reasoning is not None:
        made["reasoning_content"] = parsed.reasoning
    if parsed.tool_calls:
        made["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": dict(call.arguments)},
            }
            for call in parsed.tool_calls
        ]
    return made


def call_id(number: int) -> str:
    """Nine letters and digits: some templates accept no other length."""
    return f"call{number % 100_000:05d}"


def same(a: Message, b: Message) -> bool:
    """Whether two normalised messages are one; an echo may lack the reasoning."""
    if a["role"] != b["role"] or a["content"].strip() != b["content"].strip():
        return False
    if a.get("tool_call_id") != b.get("tool_call_id"):
        return False
    calls = [
        [(c["function"]["name"], c["function"]["arguments"]) for c in m.get("tool_calls", ())]
        for m in (a, b)
    ]
    return calls[0] == calls[1]


def reconciled(known: Sequence[Message], told: Sequence[Message]) -> list[Message]:
    """Return `told` with our own answers in place of the agent's echoes of them."""
    made = list(told)
    for index, (ours, theirs) in enumerate(zip(known, told, strict=False)):
        if not same(ours, theirs):
            break
        if ours["role"] == "assistant":
            made[index] = ours
    return made


def continues(known: Sequence[Message], told: Sequence[Message]) -> bool:
    """Whether a rewritten history is still the same conversation: it opens the same way."""
    opening = [m for m in known if m["role"] != "system"][:1]
    return bool(opening) and [m for m in told if m["role"] != "system"][:1] == opening


def _text(role: str, content: object) -> str:
    match content:
        case None:
            return ""
        case str():
            return content
        case list():
            parts = cast("list[Any]", content)
            if all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in parts):
                return "".join(p["text"] for p in parts)
        case _:
            pass
    raise ValueError(f"content of a {role} message must be text; images and audio are not read")


def _call(call: Any) -> dict[str, Any]:
    try:
        name, arguments = call["function"]["name"], call["function"].get("arguments")
    except (KeyError, TypeError) as error:
        raise ValueError(f"a tool call needs function.name: {call!r}") from error
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError as error:
            raise ValueError(f"arguments of the call {name!r} are no JSON: {error}") from error
    return {
        "id": str(call.get("id") or ""),
        "type": "function",
        "function": {"name": str(name), "arguments": arguments or {}},
    }
