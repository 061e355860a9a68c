"""The renderer of chat models: tokenizer, template and tool-call parser of one model directory."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from services.env_agents.chat.conversation import ChatConversation
from services.env_agents.chat.template import ChatTemplate, TemplateFault
from services.env_agents.chat.tokens import ChatTokenizer, read_json
from services.env_agents.chat.tool_parsers import PARSERS, ToolCallParser
from shared.runtime.errors import ConfigError

OPTIONS = ("tool_parser", "template", "template_variables", "system", "date")

_PROBE = "What does this template write?"
_ANSWER = "An answer."


class ChatRenderer:
    """Satisfies `ConversationRenderer`.

    Args:
        model_dir: Hugging Face directory with tokenizer.json and a chat template
            (chat_template.jinja, or chat_template in tokenizer_config.json).
        options: `task.renderer_options`: `tool_parser` (hermes, llama, mistral or
            package.module:Class; hermes), `template` (file to use instead of the model's),
            `template_variables` (`enable_thinking: false` and the like), `system` (text that
            opens conversations), `date` (YYYY-MM-DD for templates that write one; today).

    Raises:
        ConfigError: something is missing, unknown, or does not fit together.
    """

    def __init__(self, model_dir: str, options: Mapping[str, Any]) -> None:
        unknown = sorted(set(options) - set(OPTIONS))
        if unknown:
            raise ConfigError(
                f"task.renderer_options.{unknown[0]}: unknown; ChatRenderer has "
                f"{', '.join(OPTIONS)}"
            )
        folder = Path(model_dir)
        self.tokenizer = ChatTokenizer(folder)
        self.stop_ids = self.tokenizer.stop_ids
        described = folder / "tokenizer_config.json"
        config = read_json(described) if described.is_file() else {}
        source, origin = _template_of(folder, config, options.get("template"))
        variables = _special_tokens(config) | dict(options.get("template_variables", {}))
        try:
            self.template = ChatTemplate(source, variables, _date(options.get("date")))
        except TemplateFault as error:
            raise ConfigError(f"{origin}: {error}") from error
        self.parser = _parser(str(options.get("tool_parser", "hermes")))
        self._system = str(options.get("system", ""))
        self._probe(origin)

    def conversation(self) -> ChatConversation:
        """Return the empty history of a new episode."""
        return ChatConversation(self.tokenizer, self.template, self.parser, self._system)

    def _probe(self, origin: str) -> None:
        """Refuse a template in which an answer would not stand where it is asked for."""
        user = {"role": "user", "content": _PROBE}
        said = {"role": "assistant", "content": _ANSWER}
        try:
            asked = self.template.render([user], None, generate=True)
            answered = self.template.render([user, said], None, generate=False)
        except TemplateFault as error:
            raise ConfigError(f"{origin}: {error}") from error
        if _PROBE not in asked:
            raise ConfigError(f"{origin}: leaves out what the user says: it is no chat template")
        if not answered.startswith(asked) or self.tokenizer.has_special(
            answered[len(asked) :].partition(_ANSWER)[0]
        ):
            raise ConfigError(
                f"{origin}: add_generation_prompt does not open an answer; the template needs "
                "{% if add_generation_prompt %} with what precedes an answer"
            )
        if self.tokenizer.first_stop(answered[len(asked) :]) is None:
            stops = ", ".join(self.tokenizer.token(i) for i in self.stop_ids)
            raise ConfigError(
                f"{origin}: writes none of the model's stop tokens ({stops}) after an answer; "
                "set eos_token_id in generation_config.json to the token that it writes"
            )


def _template_of(folder: Path, config: Mapping[str, Any], override: object) -> tuple[str, str]:
    """Return the template's text and where it is from."""
    path = Path(str(override)) if override else folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(), str(path)
    if override:
        raise ConfigError(f"task.renderer_options.template: {path} does not exist")
    origin = f"{folder / 'tokenizer_config.json'}: chat_template"
    match config.get("chat_template"):
        case str() as source:
            return source, origin
        case list() as named:
            by_name = {str(one["name"]): str(one["template"]) for one in cast("list[Any]", named)}
            for name in ("tool_use", "default"):
                if name in by_name:
                    return by_name[name], f"{origin} {name!r}"
        case _:
            pass
    raise ConfigError(
        f"model.source {folder}: has no chat template (chat_template.jinja, or chat_template in "
        "tokenizer_config.json); name a file in task.renderer_options.template, or use "
        "task.renderer: services.env_agents.text_renderer:TextRenderer"
    )


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token` and the like, whether written as text or as an added token's description."""
    found: dict[str, str] = {}
    for key, value in config.items():
        if not key.endswith("_token"):
            continue
        text = cast("dict[str, Any]", value).get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            found[key] = text
    return found


def _parser(name: str) -> ToolCallParser:
    if name in PARSERS:
        return PARSERS[name]()
    module_name, separator, class_name = name.partition(":")
    if not separator:
        raise ConfigError(
            f"task.renderer_options.tool_parser: {name!r} is none of {', '.join(PARSERS)}, and no "
            "package.module:Class"
        )
    try:
        return cast(ToolCallParser, getattr(import_module(module_name), class_name)())
    except Exception as error:
        raise ConfigError(
            f"task.renderer_options.tool_parser: {name}: {type(error).__name__}: {error}"
        ) from error


def _date(written: object) -> datetime:
    if written is None:
        return datetime.now()
    try:
        return datetime.fromisoformat(str(written))
    except ValueError as error:
        raise ConfigError(f"task.renderer_options.date: {error}; write YYYY-MM-DD") from error
