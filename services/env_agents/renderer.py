"""Text <-> token ids, once: ids are never re-tokenised and a history only grows.

A renderer either turns pieces of text into ids, whatever came before (`Renderer`), or keeps one
`Conversation` per episode (`ChatRenderer` in `chat/`): templates look back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from services.env_agents.answer import Parsed
from services.env_agents.environment import Observation


class Renderer(Protocol):
    """Turns what the environment says into token ids and the policy's ids into text."""

    stop_ids: tuple[int, ...]
    """Ids that end an answer."""

    def prompt(self, text: str) -> list[int]:
        """Ids of the first observation."""
        ...

    def observation(self, text: str) -> list[int]:
        """Ids appended after an answer."""
        ...

    def decode(self, ids: list[int]) -> str:
        """Text of an answer."""
        ...


@dataclass(frozen=True, slots=True)
class Continuation:
    """Ids that the policy reads next."""

    token_ids: Sequence[int]
    rewrites: bool = False
    """The history became another: these ids begin a further sequence."""
    continues: bool = True
    """A rewritten history goes on with the same conversation, not with an unrelated one."""


class Conversation(Protocol):
    """The history of one episode; `begin`, then `read` and `follow` in turns."""

    def begin(self, observation: Observation) -> list[int]:
        """Ids of the first observation.

        Raises:
            ValueError: it cannot be rendered.
        """
        ...

    def read(self, token_ids: Sequence[int]) -> tuple[str, Parsed]:
        """Take in a sampled answer; return its text, stop token included, and its meaning."""
        ...

    def follow(self, observation: Observation) -> Continuation:
        """Ids that come after the last answer.

        Raises:
            ValueError: it cannot be rendered.
        """
        ...


@runtime_checkable
class ConversationRenderer(Protocol):
    """A renderer that looks back."""

    stop_ids: tuple[int, ...]

    def conversation(self) -> Conversation:
        """Return the empty history of a new episode."""
        ...


class TextConversation:
    """Observations end to end, by a renderer that does not look back. Satisfies `Conversation`."""

    def __init__(self, renderer: Renderer) -> None:
        self._renderer = renderer

    def begin(self, observation: Observation) -> list[int]:
        return self._renderer.prompt(_text(observation))

    def read(self, token_ids: Sequence[int]) -> tuple[str, Parsed]:
        text = self._renderer.decode(list(token_ids))
        return text, Parsed(text)

    def follow(self, observation: Observation) -> Continuation:
        return Continuation(self._renderer.observation(_text(observation)))


def _text(observation: Observation) -> str:
    if observation.messages or observation.token_ids is not None:
        raise ValueError(
            "the environment gives chat messages, which this renderer cannot render; set "
            "task.renderer: services.env_agents.chat.renderer:ChatRenderer"
        )
    return observation.text
