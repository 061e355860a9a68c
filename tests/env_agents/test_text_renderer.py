"""The text renderer on the demo's own tokenizer, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from services.env_agents.tasks.frozen_lake import ACTIONS
from services.env_agents.text_renderer import TextRenderer
from shared.runtime.errors import ConfigError

BASE = Path(__file__).parents[2] / "examples" / "frozen_lake" / "base"
CHARACTERS = Path(__file__).parent / "char_model"
"""A tokenizer with one id per character, in which the newline ends an answer."""


def test_one_id_per_character_and_back() -> None:
    renderer = TextRenderer(str(CHARACTERS), {})
    text = "SFFF\nFHFH\nFFFH\nHFFG\n@00>"
    ids = renderer.prompt(text)
    assert len(ids) == len(text)
    assert renderer.decode(ids) == text
    assert renderer.observation("@12>") == renderer.prompt("@12>")
    assert renderer.decode(renderer.observation("right\n")) == "right\n"


def test_the_newline_ends_an_answer() -> None:
    renderer = TextRenderer(str(CHARACTERS), {})
    assert renderer.stop_ids == tuple(renderer.prompt("\n"))


def test_what_the_caller_does_with_its_ids_does_not_reach_later_callers() -> None:
    renderer = TextRenderer(str(CHARACTERS), {})
    renderer.prompt("@00>").append(99)
    assert renderer.decode(renderer.prompt("@00>")) == "@00>"


def test_a_character_outside_the_alphabet_is_an_error_not_an_unknown_token() -> None:
    with pytest.raises(ValueError, match="é"):
        TextRenderer(str(CHARACTERS), {}).prompt("café")


@pytest.mark.parametrize(("declared", "expected"), [(3, (3,)), ([3, 5], (3, 5)), (None, None)])
def test_stop_ids_are_the_declared_ends_or_else_the_newline(
    tmp_path: Path, declared: object, expected: tuple[int, ...] | None
) -> None:
    shutil.copy(CHARACTERS / "tokenizer.json", tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": declared}))
    renderer = TextRenderer(str(tmp_path), {})
    assert renderer.stop_ids == (expected or tuple(renderer.prompt("\n")))


def test_a_missing_tokenizer_is_named_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no tokenizer\.json; point it at"):
        TextRenderer(str(tmp_path), {})


def test_a_broken_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"tokenizer\.json: not a tokenizer"):
        TextRenderer(str(tmp_path), {})


def test_a_broken_generation_config_is_named(tmp_path: Path) -> None:
    shutil.copy(CHARACTERS / "tokenizer.json", tmp_path)
    (tmp_path / "generation_config.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"generation_config\.json: not a JSON object"):
        TextRenderer(str(tmp_path), {})


def test_a_tokenizer_in_which_nothing_ends_an_answer_is_refused(tmp_path: Path) -> None:
    described = json.loads((CHARACTERS / "tokenizer.json").read_text())
    del described["model"]["vocab"]["\n"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    with pytest.raises(ConfigError, match="nothing ends an answer"):
        TextRenderer(str(tmp_path), {})


def test_the_base_is_a_small_float32_hugging_face_directory() -> None:
    names = {path.name for path in BASE.iterdir()}
    assert names >= {"config.json", "generation_config.json", "model.safetensors"}
    assert names >= {"tokenizer.json", "tokenizer_config.json"}
    assert sum(path.stat().st_size for path in BASE.iterdir()) < 2e6
    config = json.loads((BASE / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert config["dtype"] == "float32"
    vocabulary = json.loads((BASE / "tokenizer.json").read_text())["model"]["vocab"]
    assert config["vocab_size"] == len(vocabulary)
    assert config["eos_token_id"] == [vocabulary[word] for word in ACTIONS]


def test_the_base_answers_one_word_with_one_token_that_ends_the_turn() -> None:
    renderer = TextRenderer(str(BASE), {})
    for word in ACTIONS:
        [token] = renderer.observation(word)
        assert token in renderer.stop_ids
    assert renderer.decode(renderer.prompt("SFFF\n@00>right")) == "SFFF\n@00>right"
