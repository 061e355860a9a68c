"""What a user implements to train on their own task.

An environment is any importable class with these three methods; it need not inherit from anything:
`environment: my_pkg.my_env:MyEnv` in the run's config. One instance plays one episode.

One that also has `act` is given answers with their tool calls parsed, instead of bare text, where
the renderer can parse them (docs/agents.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from services.env_agents.answer import Answer
from shared.wire.messages import TaskRef

Message = Mapping[str, Any]
"""A chat message as OpenAI writes it: role, content, tool_calls, tool_call_id."""


@dataclass(frozen=True, slots=True)
class Observation:
    """What the policy reads next: text, or messages for a renderer with a chat template."""

    text: str = ""
    """With a chat renderer: one further message of the user, unless there are `messages`."""
    messages: tuple[Message, ...] = ()
    """Appended to the conversation."""
    tools: tuple[Mapping[str, Any], ...] | None = None
    """OpenAI function schemas; None: those said before."""
    whole: bool = False
    """Messages (or text) are the whole history, not what is new: as agents send it."""
    token_ids: tuple[int, ...] | None = None
    """The whole history as ids, instead of messages and text."""
    max_new_tokens: int | None = None
    """A tighter bound on the next answer than the run's."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one answer of the policy led to."""

    observation: Observation
    """Ignored when the episode ends."""
    reward: float = 0.0
    terminated: bool = False
    """The task is over."""
    truncated: bool = False
    """A limit of the environment ended it; the reward is real."""
    rewards: Mapping[str, float] = field(default_factory=dict[str, float])
    """Named parts of the turn's reward."""


class EnvironmentLost(Exception):
    """What the environment lives in went away in mid-episode: its server, or its process.

    Raised by an environment; the episode ends as failed with the reason `env_lost`, which tells
    a machine's fault from the task's (`env_error`).
    """


class Environment(Protocol):
    """One episode. Async, single-use: `reset` once, `step` until it ends, `close` always."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        """`options` is `config.task.options`, as written."""
        ...

    async def reset(self, task: TaskRef) -> Observation:
        """Start the task."""
        ...

    async def step(self, answer: str) -> StepResult:
        """Apply the policy's answer (decoded text of its tokens, stop token included)."""
        ...

    def task_digest(self) -> str:
        """Digest of the task's *content* after `reset`: equal tasks have equal digests."""
        ...

    async def close(self) -> None: ...


@runtime_checkable
class ActsOnAnswers(Protocol):
    """An environment that reads parsed answers; `step` is then called by nobody."""

    async def act(self, answer: Answer) -> StepResult:
        """Apply the policy's answer."""
        ...
