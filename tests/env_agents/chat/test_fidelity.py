"""What is sampled is what is trained, over three template families; `make fidelity` does 10,000."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from datetime import datetime

import pytest

from services.env_agents.answer import Parsed
from services.env_agents.chat import conversation
from services.env_agents.chat.conversation import ChatConversation
from services.env_agents.chat.template import ChatTemplate
from services.env_agents.chat.tokens import ChatTokenizer, Stop
from services.env_agents.environment import Observation
from tests.env_agents.chat.conversations import FAMILIES, MODELS, renderer, tools
from tests.env_agents.chat.fidelity import Check, run

PER_FAMILY = 80


def play(family: str, count: int) -> None:
    for seed in range(count):
        Check(family, seed).play()


@pytest.mark.parametrize("family", FAMILIES)
def test_context_is_the_templates_and_the_mask_is_on_exactly_what_was_sampled(family: str) -> None:
    play(family, PER_FAMILY)


def test_the_random_conversations_hold_every_case_they_are_meant_to() -> None:
    counts = run(90, first=5000)
    assert counts["sampled tokens"] == counts["trained tokens"]
    for case in ("canonical", "cut or spelt otherwise", "rewritten histories",
                 "answers without a stop", "histories sent whole"):  # fmt: skip
        assert counts[case] >= 10, case


def test_answers_tokenised_again_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def retokenised(self: ChatConversation, asked: str) -> None:
        return None  # every turn begins a further sequence, whose prompt holds the old answers

    monkeypatch.setattr(ChatConversation, "_glue", retokenised)
    counts = run(30)
    # Still exact, since what was sampled stays in its own sequence; but one sequence per answer.
    assert counts["sequences"] == counts["answers"]


def test_a_history_taken_for_unchanged_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversation, "same_meaning", lambda a, b: True)
    with pytest.raises(AssertionError, match="the history holds what was sampled"):
        play("qwen3", 60)


def test_a_lost_glue_token_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = ChatTokenizer.encode_after_stop

    def lossy(self: ChatTokenizer, end: Stop, text: str, *, with_stop: bool) -> list[int]:
        ids = exact(self, end, text, with_stop=with_stop)
        return ids[1:] if not with_stop else ids

    monkeypatch.setattr(ChatTokenizer, "encode_after_stop", lossy)
    with pytest.raises(AssertionError, match="glue is the template's"):
        play("qwen3", 20)


def test_glue_tokenised_on_its_own_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def alone(self: ChatTokenizer, end: Stop, text: str, *, with_stop: bool) -> list[int]:
        assert not with_stop
        return self.encode(text.removeprefix("[TOOL_RESULTS]"))

    monkeypatch.setattr(ChatTokenizer, "encode_after_stop", alone)
    with pytest.raises(AssertionError):
        play("mistral", 20)


def _asked(messages: Sequence[dict[str, object]], answer: str, then: dict[str, object]) -> bool:
    """Whether the history is rewritten when `then` follows `answer` (Qwen3)."""
    chat = renderer("qwen3").conversation()
    chat.begin(Observation(messages=tuple(messages)))
    chat.read([*renderer("qwen3").tokenizer.encode(answer), renderer("qwen3").stop_ids[0]])
    return chat.follow(Observation(messages=(then,))).rewrites


def test_thinking_stays_through_a_tool_loop_and_is_stripped_by_the_next_query() -> None:
    opening = [{"role": "user", "content": "hi"}]
    call = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    tool = {"role": "tool", "content": "7"}
    query = {"role": "user", "content": "and now?"}
    assert not _asked(opening, f"<think>\nhm\n</think>\n\n{call}", tool)
    assert _asked(opening, "<think>\nhm\n</think>\n\nSeven.", query)
    assert not _asked(opening, "Seven.", query)


def test_a_template_that_closes_thinking_in_its_prompt_rewrites_every_history() -> None:
    model = renderer("qwen3")
    source = (MODELS / "qwen3" / "chat_template.jinja").read_text()

    off = ChatTemplate(source, {"enable_thinking": False}, datetime(2026, 1, 2))
    chat = ChatConversation(model.tokenizer, off, model.parser)
    chat.begin(Observation("hi"))
    chat.read([*model.tokenizer.encode("Seven."), model.stop_ids[0]])
    assert chat.follow(Observation("and now?")).rewrites


def test_masks_need_no_generation_markers_in_the_template() -> None:
    model = renderer("qwen3")
    source = (MODELS / "qwen3" / "chat_template.jinja").read_text()
    bare = re.sub(r"\{%- (end)?generation %\}", "", source)
    assert bare != source
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "seven"}]
    now, schemas = datetime(2026, 1, 2), tools(random.Random(0))
    marked, unmarked = (
        ChatTemplate(text, {}, now).render(messages, schemas, generate=True)
        for text in (source, bare)
    )
    assert marked == unmarked
    chat = ChatConversation(model.tokenizer, ChatTemplate(bare, {}, now), model.parser)
    chat.begin(Observation("hi"))
    chat.read([*model.tokenizer.encode("Seven."), model.stop_ids[0]])
    assert not chat.follow(Observation("and now?")).rewrites


def test_an_agent_that_drops_old_messages_begins_a_further_sequence_of_the_same_conversation() -> (
    None
):
    model = renderer("llama3")
    chat = model.conversation()
    opening = {"role": "user", "content": "hi"}
    chat.begin(Observation(messages=(opening,), whole=True))
    for text in ("one", "two"):
        chat.read([*model.tokenizer.encode(text), model.stop_ids[-1]])
        last = chat.last_message()
        read = chat.follow(
            Observation(messages=(opening, last, {"role": "user", "content": "more"}), whole=True)
        )
    assert read.rewrites
    assert read.continues
    chat.read([*model.tokenizer.encode("three"), model.stop_ids[-1]])
    other = {"role": "user", "content": "another conversation"}
    unrelated = chat.follow(Observation(messages=(other,), whole=True))
    assert unrelated.rewrites
    assert not unrelated.continues


def test_text_and_ids_are_histories_too() -> None:
    model = renderer("qwen3")
    chat = model.conversation()
    chat.begin(Observation("Once upon", whole=True))
    ids = model.tokenizer.encode(" a time")
    text, parsed = chat.read(ids)
    assert (text, parsed) == (" a time", Parsed(" a time"))
    grown = chat.follow(Observation("Once upon a time, long ago", whole=True))
    assert not grown.rewrites
    assert model.tokenizer.decode(list(grown.token_ids)) == ", long ago"
    assert chat.follow(Observation("Another text", whole=True)).rewrites
    chat = model.conversation()
    chat.begin(Observation(token_ids=(1, 2, 3), whole=True))
    chat.read([4, 5])
    assert chat.follow(Observation(token_ids=(1, 2, 3, 4, 5, 6), whole=True)).token_ids == [6]
    assert chat.follow(Observation(token_ids=(1, 9), whole=True)).rewrites
