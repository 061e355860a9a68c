"""Random tool conversations over the three chat fixtures, and a policy that answers in them.

The policy writes what it means in its family's format, or with other blanks, or cuts its tokens
where no tokenizer would, ends with another stop token, or with none. Meanings are drawn here and
never parsed: they are what the reference is told.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from services.env_agents.chat.renderer import ChatRenderer

MODELS = Path(__file__).parents[1] / "chat_models"
DATE = "2026-01-02"
PARSERS = {"qwen3": "hermes", "llama3": "llama", "mistral": "mistral"}
FAMILIES = tuple(PARSERS)

WORDS = ("order", "refund", "Grüße", "日本", "naïve", "it's", "42", "3.14", "a/b", "<b>", '"q"',
         "{x}", "€", "🙂", "return", "[1]", "plan\nB", "no.")  # fmt: skip


@lru_cache
def renderer(family: str) -> ChatRenderer:
    return ChatRenderer(str(MODELS / family), {"tool_parser": PARSERS[family], "date": DATE})


@lru_cache
def reference(family: str) -> PreTrainedTokenizerFast:
    """Transformers' tokenizer and template engine over the same files."""
    config = json.loads((MODELS / family / "tokenizer_config.json").read_text())
    made = PreTrainedTokenizerFast(
        tokenizer_file=str(MODELS / family / "tokenizer.json"),
        **{k: v for k, v in config.items() if k.endswith("_token") and v},
    )
    made.chat_template = (MODELS / family / "chat_template.jinja").read_text()
    return made


def tools(rng: random.Random) -> tuple[dict[str, Any], ...]:
    names = rng.sample(["get_order", "cancel", "list_flights", "reset_line"], rng.randint(1, 3))
    return tuple(
        {
            "type": "function",
            "function": {
                "name": name,
                "description": sentence(rng),
                "parameters": {"type": "object", "properties": {"id": {"type": "string"}}},
            },
        }
        for name in names
    )


def sentence(rng: random.Random) -> str:
    # No blanks at either end: templates trim some of them.
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 6)))


@dataclass
class Meaning:
    """What the policy wants to say."""

    content: str = ""
    reasoning: str | None = None
    calls: list[tuple[str, dict[str, Any], str]] = field(default_factory=list)
    """Name, arguments, id."""

    def message(self, *, echo: bool = False) -> dict[str, Any]:
        """As a chat message; `echo`: as an agent sends back what an OpenAI server gave it."""
        made: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning and not echo:
            made["reasoning_content"] = self.reasoning
        if self.calls:
            if echo and not self.content:
                made["content"] = None
            made["tool_calls"] = [
                {
                    "id": call_id,
                    "type": "function",
                    "function": {"name": name, "arguments": json.dumps(args) if echo else args},
                }
                for name, args, call_id in self.calls
            ]
        return made


def meaning(family: str, rng: random.Random, first_call: int) -> Meaning:
    drawn = Meaning(content=sentence(rng))
    if family == "qwen3" and rng.random() < 0.5:
        drawn.reasoning = sentence(rng)
    if rng.random() < 0.55:
        most = 1 if family == "llama3" else 2
        for index in range(rng.randint(1, most)):
            arguments = {"id": sentence(rng), "n": rng.randint(0, 99), "deep": {"a": [1, None]}}
            drawn.calls.append(("get_order", arguments, f"call{first_call + index:05d}"))
        if family != "qwen3" or rng.random() < 0.5:
            drawn.content = ""
    return drawn


def written(family: str, meant: Meaning, rng: random.Random, *, canonical: bool) -> str:
    """The text of a meaning; its stop token is left out."""

    def dumps(value: object) -> str:
        if canonical or rng.random() < 0.5:
            return json.dumps(value, ensure_ascii=False)
        return json.dumps(value, ensure_ascii=rng.random() < 0.5, separators=(",", ":"))

    blank = "" if canonical else rng.choice(["", " ", "\n"])
    if family == "llama3":
        for name, arguments, _ in meant.calls:
            return f'{{"name": "{name}", "parameters": {dumps(arguments)}}}{blank}'
        return blank + meant.content
    if family == "mistral":
        calls = [
            f'{{"name": "{name}", "arguments": {dumps(arguments)}, "id": "{call_id}"}}'
            for name, arguments, call_id in meant.calls
        ]
        return f"[TOOL_CALLS] [{', '.join(calls)}]{blank}" if calls else f" {meant.content}{blank}"
    text = f"<think>\n{meant.reasoning}\n</think>\n\n" if meant.reasoning else ""
    text += meant.content
    for index, (name, arguments, _) in enumerate(meant.calls):
        text += "\n" if meant.content or index else ""
        call = f'{{"name": "{name}", "arguments": {dumps(arguments)}}}'
        text += f"<tool_call>\n{blank}{call}\n</tool_call>"
    return text + blank


def sampled_ids(family: str, text: str, rng: random.Random, *, canonical: bool) -> list[int]:
    """Ids of an answer: as the tokenizer cuts it, or cut where it never would."""
    ids = renderer(family).tokenizer.encode(text)
    if canonical:
        return ids
    made: list[int] = []
    for token_id in ids:
        made += _cut(family, token_id, rng) if rng.random() < 0.5 else [token_id]
    return made


def _cut(family: str, token_id: int, rng: random.Random) -> list[int]:
    vocabulary = _pieces(family)
    token = renderer(family).tokenizer.token(token_id)
    if token.startswith("<") or token.startswith("["):  # special, byte fallback: not to be cut
        return [token_id]
    at = rng.randint(1, len(token))
    halves = [vocabulary.get(token[:at]), vocabulary.get(token[at:])] if at < len(token) else []
    return [h for h in halves if h is not None] if None not in halves and halves else [token_id]


@lru_cache
def _pieces(family: str) -> dict[str, int]:
    return reference(family).get_vocab()
