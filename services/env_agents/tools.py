"""Python functions as tools: OpenAI schemas from their signatures, arguments checked before a call.

Whatever is wrong with a call becomes the text that the policy reads next, as agents expect it.
"""

from __future__ import annotations

import inspect
import json
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

from services.env_agents.answer import ToolCall

_KINDS: Mapping[Any, str] = {
    str: "string", int: "integer", float: "number", bool: "boolean", dict: "object", list: "array",
}  # fmt: skip


class ToolFault(Exception):
    """A call that cannot be made; its text is the policy's observation."""


@dataclass(frozen=True, slots=True)
class Tool:
    """A function and how it is described to the policy."""

    name: str
    description: str
    parameters: Mapping[str, Any]
    """JSON schema of the arguments."""
    function: Callable[..., Any]

    @classmethod
    def of(cls, function: Callable[..., Any]) -> Tool:
        """Describe a function by its annotations and the first paragraph of its docstring.

        Raises:
            TypeError: an argument without an annotation that JSON can express.
        """
        hints = typing.get_type_hints(function)
        properties: dict[str, Any] = {}
        required: list[str] = []
        for name, parameter in inspect.signature(function).parameters.items():
            if name not in hints or parameter.kind in (
                parameter.VAR_POSITIONAL,
                parameter.VAR_KEYWORD,
            ):
                raise TypeError(f"tool {function.__name__}: annotate its argument {name!r}")
            properties[name] = _schema(hints[name], f"tool {function.__name__}, {name!r}")
            if parameter.default is parameter.empty:
                required.append(name)
        said = inspect.getdoc(function) or ""
        return cls(
            name=function.__name__,
            description=" ".join(said.split("\n\n")[0].split()),
            parameters={"type": "object", "properties": properties, "required": required},
            function=function,
        )

    @property
    def schema(self) -> dict[str, Any]:
        """The form that chat templates and agents read."""
        described = {"name": self.name, "description": self.description}
        return {"type": "function", "function": {**described, "parameters": dict(self.parameters)}}


class Toolbox:
    """The tools of one environment.

    Args:
        functions: callables with annotated arguments; async ones are awaited.
    """

    def __init__(self, functions: Sequence[Callable[..., Any]]) -> None:
        self._tools = {tool.name: tool for tool in map(Tool.of, functions)}

    @property
    def schemas(self) -> tuple[dict[str, Any], ...]:
        return tuple(tool.schema for tool in self._tools.values())

    async def call(self, call: ToolCall) -> str:
        """Make a call and return its result as text.

        Raises:
            ToolFault: unknown tool, wrong arguments, or the function's own refusal.
        """
        tool = self._tools.get(call.name)
        if tool is None:
            raise ToolFault(f"unknown tool {call.name!r}; there are {', '.join(self._tools)}")
        _check(tool, call.arguments)
        result = tool.function(**call.arguments)
        if inspect.isawaitable(result):
            result = await result
        return result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)


def _check(tool: Tool, arguments: Mapping[str, Any]) -> None:
    properties = tool.parameters["properties"]
    for name in arguments:
        if name not in properties:
            known = ", ".join(properties) or "none"
            raise ToolFault(f"{tool.name}: unknown argument {name!r}; its arguments are {known}")
    for name in tool.parameters["required"]:
        if name not in arguments:
            raise ToolFault(f"{tool.name}: argument {name!r} is missing")
    for name, value in arguments.items():
        if not _fits(value, properties[name]):
            wanted = properties[name].get("enum") or properties[name]["type"]
            raise ToolFault(f"{tool.name}: argument {name!r} must be {wanted}, not {value!r}")


def _fits(value: object, schema: Mapping[str, Any]) -> bool:
    if "enum" in schema:
        return value in schema["enum"]
    match schema["type"]:
        case "string":
            return isinstance(value, str)
        case "boolean":
            return isinstance(value, bool)
        case "integer":
            return isinstance(value, int) and not isinstance(value, bool)
        case "number":
            return isinstance(value, int | float) and not isinstance(value, bool)
        case "array":
            items = schema.get("items")
            return isinstance(value, list) and (
                items is None or all(_fits(one, items) for one in typing.cast("list[Any]", value))
            )
        case _:
            return isinstance(value, dict)


def _schema(hint: Any, where: str) -> dict[str, Any]:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        plain = [one for one in inner if one is not type(None)]
        if len(plain) == 1:
            return _schema(plain[0], where)
    if origin is Literal:
        return {"type": "string", "enum": list(inner)}
    if origin is list:
        return {"type": "array", "items": _schema(inner[0], where)}
    kind = _KINDS.get(origin or hint)
    if kind is None:
        raise TypeError(f"{where}: {hint!r} is nothing that JSON can express")
    return {"type": kind}
