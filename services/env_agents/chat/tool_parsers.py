"""Text of an answer -> what is said, what was thought, which tools are called.

A parser never raises: what it cannot read becomes an error that the policy is shown. An answer in
which any call is malformed makes no call at all, and keeps its text as content: so the history
that the template writes next is the text that was sampled.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any, Protocol, cast

from services.env_agents.answer import Parsed, ToolCall

THINK_END = "</think>"


class ToolCallParser(Protocol):
    """One family's way to write tool calls."""

    def parse(self, text: str) -> Parsed:
        """Read an answer whose stop token has been taken off."""
        ...


class HermesParser:
    """`<tool_call>{"name": …, "arguments": {…}}</tool_call>`: Hermes, Qwen2.5, Qwen3.

    Thinking is what stands before `</think>`, whether the answer or the prompt opened it.
    """

    _CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)

    def parse(self, text: str) -> Parsed:
        reasoning, body = split_reasoning(text)
        calls, errors = _read_all(self._CALL.findall(body), "arguments")
        rest = self._CALL.sub("", body)
        if "<tool_call>" in rest:
            errors.append("a <tool_call> is not closed by </tool_call>")
        elif "</tool_call>" in rest:
            errors.append("a </tool_call> without <tool_call>")
        return _parsed(text, rest, reasoning, calls, errors)


class LlamaParser:
    """`{"name": …, "parameters": {…}}` as the whole answer: Llama 3.x, JSON tool calling."""

    def parse(self, text: str) -> Parsed:
        body = text.strip()
        tagged = body.startswith("<|python_tag|>")
        body = body.removeprefix("<|python_tag|>").strip()
        if not tagged and not re.match(r'\{\s*"(name|type|function|parameters)"', body):
            return Parsed(text.strip())
        calls, errors = _read_all(_objects(body), "parameters")
        return _parsed(text, "", None, calls, errors)


class MistralParser:
    """`[TOOL_CALLS] [{"name": …, "arguments": {…}, "id": …}]`: Mistral, tokenizer version 3."""

    def parse(self, text: str) -> Parsed:
        said, marker, written = text.partition("[TOOL_CALLS]")
        if not marker:
            return Parsed(text.strip())
        try:
            listed = json.loads(written)
            if not isinstance(listed, list) or not listed:
                raise ValueError("not a list of calls")
        except (ValueError, RecursionError) as error:
            return _parsed(text, "", None, [], [f"[TOOL_CALLS] needs a JSON list: {error}"])
        found = [json.dumps(one) for one in cast("list[Any]", listed)]
        calls, errors = _read_all(found, "arguments")
        return _parsed(text, said, None, calls, errors)


PARSERS: dict[str, Callable[[], ToolCallParser]] = {
    "hermes": HermesParser,
    "llama": LlamaParser,
    "mistral": MistralParser,
}
"""By the name that `task.renderer_options.tool_parser` takes."""


def split_reasoning(text: str) -> tuple[str | None, str]:
    """Return (thinking, the rest); None where nothing was thought or thinking never ended."""
    thought, end, rest = text.partition(THINK_END)
    if not end:
        return None, text
    thought = thought.strip()
    return thought.removeprefix("<think>").strip() or None, rest


def same_meaning(a: Parsed, b: Parsed) -> bool:
    """Whether two texts say, think and call the same; blanks and ids of calls aside."""
    return (
        a.content.strip() == b.content.strip()
        and (a.reasoning or None) == (b.reasoning or None)
        and [(c.name, c.arguments) for c in a.tool_calls]
        == [(c.name, c.arguments) for c in b.tool_calls]
    )


def _parsed(
    text: str, rest: str, reasoning: str | None, calls: list[ToolCall], errors: list[str]
) -> Parsed:
    if errors:
        said = split_reasoning(text)[1] if reasoning is not None else text
        return Parsed(said.strip(), reasoning, (), tuple(errors))
    return Parsed(rest.strip(), reasoning, tuple(calls))


def _read_all(written: list[str] | Iterator[str], key: str) -> tuple[list[ToolCall], list[str]]:
    calls: list[ToolCall] = []
    errors: list[str] = []
    for one in written:
        try:
            calls.append(_read(one, key))
        except (ValueError, RecursionError) as error:
            errors.append(f"malformed tool call {one.strip()[:120]!r}: {error}")
    return calls, errors


def _read(written: str, key: str) -> ToolCall:
    found = json.loads(written)
    if not isinstance(found, dict):
        raise ValueError("not a JSON object")
    call = cast("dict[str, Any]", found)
    name, arguments = call.get("name"), call.get(key)
    if not isinstance(name, str) or not name:
        raise ValueError('"name" is missing or no string')
    if not isinstance(arguments, dict):
        raise ValueError(f'"{key}" is missing or no object')
    own_id = call.get("id")
    return ToolCall(
        name, cast("dict[str, Any]", arguments), own_id if isinstance(own_id, str) else ""
    )


def _objects(text: str) -> Iterator[str]:
    """Split `{…}; {…}` into its objects; what is no object comes whole, to fail when read."""
    decoder = json.JSONDecoder()
    position = 0
    while position < len(text):
        try:
            _, stop = decoder.raw_decode(text, position)
        except ValueError:
            yield text[position:]
            return
        yield text[position:stop]
        position = stop + len(text[stop:]) - len(text[stop:].lstrip("; \n\t"))
