"""Reading answers: well-formed calls, every way to get one wrong, thinking."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.env_agents.answer import Parsed, ToolCall
from services.env_agents.chat.tool_parsers import PARSERS

F = '{"name": "f", "arguments": {"x": 1}}'
CALL = ToolCall("f", {"x": 1})


@pytest.mark.parametrize(
    ("family", "text", "expected"),
    [
        ("hermes", "hello", Parsed("hello")),
        ("hermes", f"<tool_call>{F}</tool_call>", Parsed("", None, (CALL,))),
        (
            "hermes",
            f"<think>\nhm\n</think>\n\nfirst\n<tool_call>\n{F}\n</tool_call>\n<tool_call>{F}</tool_call>",
            Parsed("first", "hm", (CALL, CALL)),
        ),
        ("hermes", "hm\n</think>\n\nyes", Parsed("yes", "hm")),
        ("hermes", "<think>\nnever ended", Parsed("<think>\nnever ended")),
        ("llama", '{"name": "f", "parameters": {"x": 1}}', Parsed("", None, (CALL,))),
        ("llama", '<|python_tag|>{"name": "f", "parameters": {"x": 1}}', Parsed("", None, (CALL,))),
        ("llama", 'see {"name": "f"}', Parsed('see {"name": "f"}')),
        ("llama", '{"x": 1}', Parsed('{"x": 1}')),
        (
            "mistral",
            '[TOOL_CALLS] [{"name": "f", "arguments": {"x": 1}, "id": "abcdefghi"}]',
            Parsed("", None, (ToolCall("f", {"x": 1}, "abcdefghi"),)),
        ),
        ("mistral", " hello", Parsed("hello")),
    ],
)
def test_answers_mean_what_their_family_means(family: str, text: str, expected: Parsed) -> None:
    assert PARSERS[family]().parse(text) == expected


@pytest.mark.parametrize(
    ("family", "text", "reason"),
    [
        ("hermes", "<tool_call>{not json}</tool_call>", "malformed tool call"),
        ("hermes", "<tool_call>[1]</tool_call>", "not a JSON object"),
        ("hermes", '<tool_call>{"arguments": {}}</tool_call>', '"name" is missing'),
        ("hermes", '<tool_call>{"name": 3, "arguments": {}}</tool_call>', '"name" is missing'),
        ("hermes", '<tool_call>{"name": "f"}</tool_call>', '"arguments" is missing'),
        ("hermes", '<tool_call>{"name": "f", "arguments": "x"}</tool_call>', "no object"),
        ("hermes", f"<tool_call>{F}", "not closed"),
        ("hermes", f"{F}</tool_call>", "without <tool_call>"),
        ("hermes", f"<tool_call>{F}</tool_call><tool_call>{{</tool_call>", "malformed tool call"),
        ("hermes", "<tool_call>" + "[" * 100_000 + "</tool_call>", "malformed tool call"),
        ("llama", '{"name": "f", "parameters": {"x": 1}', "malformed tool call"),
        ("llama", '{"name": "f", "arguments": {"x": 1}}', '"parameters" is missing'),
        ("mistral", "[TOOL_CALLS] f(x)", "needs a JSON list"),
        ("mistral", '[TOOL_CALLS] {"name": "f"}', "not a list of calls"),
        ("mistral", '[TOOL_CALLS] [{"name": "f"}]', '"arguments" is missing'),
    ],
)
def test_a_malformed_call_makes_no_call_and_says_why(family: str, text: str, reason: str) -> None:
    parsed = PARSERS[family]().parse(text)
    assert parsed.tool_calls == ()
    assert any(reason in error for error in parsed.errors), parsed.errors
    assert parsed.content == text.strip()


@given(
    st.sampled_from(sorted(PARSERS)),
    st.text(alphabet='<>{}[]"/:tool_callthinkTOL,\n ', max_size=60),
)
def test_no_text_makes_a_parser_raise(family: str, text: str) -> None:
    for prefix in ("", "<tool_call>", "[TOOL_CALLS]", '{"name"', "<think>"):
        parsed = PARSERS[family]().parse(prefix + text)
        assert not (parsed.errors and parsed.tool_calls)
