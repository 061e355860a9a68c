"""Model directories that cannot work are refused at start, in one line that names the offender."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from services.env_agents.chat.renderer import ChatRenderer
from services.env_agents.environment import Observation
from shared.runtime.errors import ConfigError
from tests.env_agents.chat.conversations import MODELS

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
OPENING = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MODELS / "qwen3", tmp_path / "model"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refusal(model: Path, **options: Any) -> str:
    with pytest.raises(ConfigError) as refused:
        ChatRenderer(str(model), options)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_tokenizer_with_more_tokens_than_the_model_has_rows_is_refused(model: Path) -> None:
    edit(model / "config.json", vocab_size=400)
    assert "config.json has vocab_size 400: the tokenizer is not this model's" in refusal(model)


def test_a_stop_id_that_the_tokenizer_does_not_know_is_refused(model: Path) -> None:
    edit(model / "generation_config.json", eos_token_id=99_999)
    assert "eos_token_id 99999 is no token of" in refusal(model)


def test_a_stop_id_that_is_another_token_for_the_tokenizer_is_refused(model: Path) -> None:
    # Ids shifted by two, as with the tokenizer of another model of the same size.
    edit(model / "generation_config.json", eos_token_id=[484])
    assert "writes none of the model's stop tokens (</tool_call>)" in refusal(model)


def test_a_stop_token_that_is_plain_text_is_refused(model: Path) -> None:
    half_a_letter = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]["Ã"]
    edit(model / "generation_config.json", eos_token_id=half_a_letter)
    assert "the stop token must be an added token" in refusal(model)


def test_without_a_stop_token_nothing_ends_an_answer(model: Path) -> None:
    (model / "generation_config.json").unlink()
    assert "nothing ends an answer" in refusal(model)


def test_a_template_that_opens_no_answer_is_refused(model: Path) -> None:
    (model / "chat_template.jinja").write_text(CHATML)
    assert "add_generation_prompt does not open an answer" in refusal(model)
    (model / "chat_template.jinja").write_text(CHATML + OPENING)
    ChatRenderer(str(model), {})


def test_a_template_that_is_no_template_is_refused_with_its_line(model: Path) -> None:
    (model / "chat_template.jinja").write_text("{% for m in messages %}\n{% endif %}")
    assert "chat_template.jinja: chat template, line 2" in refusal(model)
    (model / "chat_template.jinja").write_text("{{ messages[0].content.upper }}")
    assert "leaves out what the user says" in refusal(model)
    (model / "chat_template.jinja").write_text("{{ raise_exception('only on Sundays') }}")
    assert "only on Sundays" in refusal(model)


def test_a_template_cannot_reach_the_process(model: Path) -> None:
    (model / "chat_template.jinja").write_text("{{ messages.__class__.__mro__ }}")
    assert "is unsafe" in refusal(model)


def test_without_a_template_another_renderer_is_named(model: Path) -> None:
    (model / "chat_template.jinja").unlink()
    assert "has no chat template" in refusal(model)


def test_templates_are_also_read_from_the_tokenizers_config(model: Path) -> None:
    (model / "chat_template.jinja").unlink()
    named = [
        {"name": "default", "template": "-"},
        {"name": "tool_use", "template": CHATML + OPENING},
    ]
    for written in (CHATML + OPENING, named):
        edit(model / "tokenizer_config.json", chat_template=written)
        made = ChatRenderer(str(model), {})
        ids = made.conversation().begin(Observation("hi"))
        assert made.tokenizer.decode(ids) == (
            "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
        )


def test_unknown_options_and_parsers_are_named(model: Path) -> None:
    assert "task.renderer_options.parser: unknown" in refusal(model, parser="hermes")
    assert "'qwen' is none of hermes, llama, mistral" in refusal(model, tool_parser="qwen")
    assert "write YYYY-MM-DD" in refusal(model, date="today")
    assert "does not exist" in refusal(model, template="/nowhere.jinja")


def test_an_own_parser_and_a_system_text_are_used(model: Path) -> None:
    made = ChatRenderer(
        str(model),
        {
            "system": "Be brief.",
            "tool_parser": "services.env_agents.chat.tool_parsers:MistralParser",
        },
    )
    text = made.tokenizer.decode(made.conversation().begin(Observation("hi")))
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi")
    assert type(made.parser).__name__ == "MistralParser"


def test_messages_that_a_template_refuses_are_a_fault_that_names_them() -> None:
    mistral = ChatRenderer(str(MODELS / "mistral"), {"tool_parser": "mistral"})
    with pytest.raises(ValueError, match=r"last roles: moderator.*Only user, assistant and tool"):
        mistral.conversation().begin(
            Observation(messages=({"role": "moderator", "content": "hi"},))
        )
    for message, reason in (
        ({"content": "x"}, "needs a string `role`"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "must be text"),
        ({"role": "assistant", "tool_calls": [{}]}, "needs function.name"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
            "are no JSON",
        ),
    ):
        with pytest.raises(ValueError, match=reason):
            mistral.conversation().begin(Observation(messages=(message,)))


def test_a_template_without_generation_markers_gives_the_same_ids_and_the_same_masks(
    model: Path, tmp_path: Path
) -> None:
    marked = (model / "chat_template.jinja").read_text()
    bare = re.sub(r"\{%- (end)?generation %\}\n", "", marked)
    assert ("generation %}" in marked, "generation %}" in bare) == (True, False)
    plain = Path(shutil.copytree(model, tmp_path / "plain"))
    (plain / "chat_template.jinja").write_text(bare)
    played: list[tuple[list[int], list[bool]]] = []
    for folder in (model, plain):
        renderer = ChatRenderer(str(folder), {})
        conversation = renderer.conversation()
        ids = conversation.begin(Observation("What is 2 + 3?"))
        mask = [False] * len(ids)
        for said in ('<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>', "It is 5."):
            sampled = [*renderer.tokenizer.encode(said), renderer.stop_ids[0]]
            conversation.read(sampled)
            told = conversation.follow(Observation(messages=({"role": "tool", "content": "5"},)))
            assert not told.rewrites
            ids += [*sampled, *told.token_ids]
            mask += [True] * len(sampled) + [False] * len(told.token_ids)
        played.append((ids, mask))
    assert played[0] == played[1]
