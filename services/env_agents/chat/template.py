"""A chat template: messages and tools -> text, with the globals that Hugging Face gives one."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, cast

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class TemplateFault(ValueError):
    """The template is no template, or refuses these messages."""


class ChatTemplate:
    """A compiled template.

    Args:
        source: jinja text.
        variables: what the template may read beside messages and tools: `bos_token`,
            `eos_token`, and switches such as `enable_thinking`.
        now: what `strftime_now` tells for the length of the process. A template that writes the
            date must not rewrite the history of an episode that is played past midnight.

    Raises:
        TemplateFault: a syntax error.
    """

    def __init__(self, source: str, variables: Mapping[str, Any], now: datetime) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationMarkers, "jinja2.ext.loopcontrols"],
        )
        # Jinja's stubs list its own globals as the only ones.
        cast("dict[str, Any]", environment.globals).update(
            raise_exception=_raise, strftime_now=_clock(now)
        )
        environment.filters["tojson"] = _tojson
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise TemplateFault(f"chat template, line {error.lineno}: {error.message}") from error
        self._variables = dict(variables)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        *,
        generate: bool,
    ) -> str:
        """Return the text; with `generate`, up to where the next answer begins.

        Raises:
            TemplateFault: the template refuses these messages, with its reason.
        """
        try:
            return self._template.render(
                messages=list(messages),
                tools=list(tools) if tools else None,
                documents=None,
                add_generation_prompt=generate,
                **self._variables,
            )
        except Exception as error:
            # Jinja lets errors of the expressions themselves through: any class may arrive.
            roles = ", ".join(str(m.get("role")) for m in messages[-4:])
            raise TemplateFault(
                f"the chat template refuses the messages (last roles: {roles}): "
                f"{type(error).__name__}: {error}"
            ) from error


class _GenerationMarkers(Extension):
    """`{% generation %}…{% endgeneration %}` is read and written through.

    Masks come from what was sampled, so that templates need no markers here.
    """

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML characters; templates of models expect none of that.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _clock(now: datetime) -> Callable[[str], str]:
    return now.strftime
