"""One answer of the policy, as an environment with tools reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from shared.wire.trajectory import Span


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the policy wrote well: the name may still be unknown and arguments wrong."""

    name: str
    arguments: Mapping[str, Any]
    id: str = ""


@dataclass(frozen=True, slots=True)
class Parsed:
    """What the text of an answer means."""

    content: str
    """What is said, calls and reasoning left out; the whole text where a call is malformed."""
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    errors: tuple[str, ...] = ()
    """What is wrong with its tool calls; an answer with errors makes no call at all."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer: what it means, and the tokens that were sampled."""

    text: str
    """Decoded, stop token included."""
    parsed: Parsed
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    """The sampler's, one per token."""
    spans: tuple[Span, ...] = ()
    """Version stamps over [0, number of tokens)."""
    finish: Literal["stop", "length"] = "stop"
    num_context: int = 0
    """Tokens that it was sampled after."""

    @property
    def content(self) -> str:
        return self.parsed.content

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        return self.parsed.tool_calls

    @property
    def errors(self) -> tuple[str, ...]:
        return self.parsed.errors
