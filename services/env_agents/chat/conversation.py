"""The history of one episode: sampled ids stay as they are, the template writes only the rest.

    prompt                     render(messages, generate) as ids
    answer                     sampled; read as a message, never rendered into its own sequence
    what follows               render(messages + answer + new ones, generate), minus what is there

"Minus what is there" is a check, not a hope. The new text must begin with the text that the
answer was asked with; what it then says in the answer's place, up to the stop token, must mean
what was sampled (the same content, thinking and calls: blanks and spelling of JSON may differ, ids
stay those sampled). Then the rest is glue, and its ids are appended. Otherwise the template or the
agent has rewritten the history (thinking stripped, messages left out), and the whole new text
begins a further sequence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from services.env_agents.answer import Parsed
from services.env_agents.chat import messages as chat
from services.env_agents.chat.messages import Message
from services.env_agents.chat.template import ChatTemplate
from services.env_agents.chat.tokens import ChatTokenizer
from services.env_agents.chat.tool_parsers import ToolCallParser, same_meaning
from services.env_agents.environment import Observation
from services.env_agents.renderer import Continuation


class ChatConversation:
    """Satisfies `Conversation`.

    Args:
        tokenizer: text <-> ids.
        template: messages -> text.
        parser: answers -> messages.
        system: opens conversations in which the environment says nothing as the system.
    """

    def __init__(
        self,
        tokenizer: ChatTokenizer,
        template: ChatTemplate,
        parser: ToolCallParser,
        system: str = "",
    ) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._parser = parser
        self._system = system
        self._messages: list[Message] = []
        """All of them, the last answer included."""
        self._tools: tuple[Mapping[str, Any], ...] = ()
        self._asked = ""
        """Text that the last answer was asked with."""
        self._is_raw = False
        """A history without messages: text or ids."""
        self._ids: list[int] = []
        """All of the current sequence."""
        self._answer = Parsed("")
        self._answer_stop: int | None = None
        """The stop id that ended the last answer, if one did."""
        self._answer_text = ""
        self._num_calls = 0

    def begin(self, observation: Observation) -> list[int]:
        """Return the ids of the first observation."""
        return list(self._restart(observation, self._told(observation)))

    def read(self, token_ids: Sequence[int]) -> tuple[str, Parsed]:
        """Take in a sampled answer."""
        ids = list(token_ids)
        self._ids += ids
        stops = bool(ids) and ids[-1] in self._tokenizer.stop_ids
        self._answer_stop = ids[-1] if stops else None
        self._answer_text = self._tokenizer.decode(ids[:-1] if stops else ids)
        if self._is_raw:
            self._answer = Parsed(self._answer_text)
        else:
            parsed = self._parser.parse(self._answer_text)
            self._answer = chat.numbered(parsed, self._num_calls)
            self._num_calls += len(parsed.tool_calls)
            self._messages.append(chat.of_answer(self._answer))
        return self._tokenizer.decode(ids), self._answer

    def last_message(self) -> Message:
        """Return the last answer as a message."""
        if self._is_raw:
            return {"role": "assistant", "content": self._answer_text}
        return self._messages[-1]

    def follow(self, observation: Observation) -> Continuation:
        """Return what comes after the last answer."""
        told = self._told(observation)
        ids = self._following(observation, told)
        if ids is not None:
            self._ids += ids
            return Continuation(ids)
        goes_on = told is None or chat.continues(self._messages, told)
        return Continuation(self._restart(observation, told), rewrites=True, continues=goes_on)

    # --- what the observation says
    def _told(self, observation: Observation) -> list[Message] | None:
        """Return the whole history as messages, None where it is text or ids."""
        if observation.token_ids is not None or (observation.whole and not observation.messages):
            return None
        new = [chat.normalised(message) for message in observation.messages]
        if observation.whole:
            return chat.reconciled(self._messages, new)
        new = new or [{"role": "user", "content": observation.text}]
        if not self._messages and self._system and new[0]["role"] != "system":
            new = [{"role": "system", "content": self._system}, *new]
        return [*self._messages, *new]

    def _restart(self, observation: Observation, told: list[Message] | None) -> list[int]:
        self._is_raw = told is None
        self._tools = self._tools if observation.tools is None else observation.tools
        if told is not None:
            self._messages = told
            self._asked = self._template.render(told, self._tools, generate=True)
            self._ids = self._tokenizer.encode(self._asked)
        elif observation.token_ids is not None:
            self._messages = []
            self._ids = list(observation.token_ids)
            self._asked = self._tokenizer.decode(self._ids)
        else:
            self._messages = []
            self._asked = observation.text
            self._ids = self._tokenizer.encode(self._asked)
        return list(self._ids)

    # --- what follows the last answer, None where the history was rewritten
    def _following(self, observation: Observation, told: list[Message] | None) -> list[int] | None:
        if (told is None) is not self._is_raw:
            return None
        if observation.token_ids is not None:
            return self._following_ids(observation.token_ids)
        if told is None:
            return self._following_text(observation.text)
        tools = self._tools if observation.tools is None else observation.tools
        asked = self._template.render(told, tools, generate=True)
        glue = self._glue(asked)
        if glue is not None:
            self._messages, self._tools, self._asked = told, tools, asked
        return glue

    def _glue(self, asked: str) -> list[int] | None:
        if not asked.startswith(self._asked):
            return None
        rest = asked[len(self._asked) :]
        end = self._tokenizer.first_stop(rest)
        if end is None or not same_meaning(self._parser.parse(rest[: end.start]), self._answer):
            return None
        return self._tokenizer.encode_after_stop(
            end, rest[end.stop :], with_stop=self._answer_stop is None
        )

    def _following_text(self, text: str) -> list[int] | None:
        known = self._asked + self._answer_text
        if not text.startswith(known):
            return None
        self._asked = text
        return self._tokenizer.encode(text[len(known) :])

    def _following_ids(self, token_ids: tuple[int, ...]) -> list[int] | None:
        known = self._ids
        if list(token_ids[: len(known)]) != known:
            return None
        ids = list(token_ids[len(known) :])
        self._asked = self._tokenizer.decode([*known, *ids])
        return ids
