"""What the retail_tools demo is made of: its tokenizer and template carry every conversation."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
import yaml

from services.env_agents.answer import ToolCall
from services.env_agents.chat.renderer import ChatRenderer
from shared.cli.config_cmd import read, validate
from shared.wire.messages import TaskRef

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples/retail_tools"))

import demonstrations
import make_base
import vocabulary

EXAMPLE = Path(make_base.__file__).parent


def task(index: int, split: str = "train") -> TaskRef:
    return TaskRef(dataset="retail_tools", split=split, index=index, seed=3)


@pytest.fixture(scope="module")
def renderer(tmp_path_factory: pytest.TempPathFactory) -> ChatRenderer:
    return make_base.describe(tmp_path_factory.mktemp("model"))


def test_the_base_is_warmed_up_on_what_the_demo_plays() -> None:
    values = read(EXAMPLE / "values.yaml")
    validate(values)
    config = yaml.safe_load((EXAMPLE / "values.yaml").read_text())["config"]
    assert config["task"]["options"] == make_base.OPTIONS
    assert config["task"]["max_turns"] == demonstrations.MAX_TURNS
    assert config["learner"]["eval"]["samples"] == 4


async def test_without_noise_every_demonstration_solves_its_task(renderer: ChatRenderer) -> None:
    rng = random.Random(0)
    for index in range(60):
        ids, written, reward = await demonstrations.demonstrate(
            renderer, task(index), make_base.OPTIONS, rng, 0.0
        )
        assert reward == 1.0
        assert len(ids) == len(written) < make_base.LONGEST
        # Decisions, not spelling: a few tokens a turn.
        assert sum(written) <= 30


async def test_with_noise_some_do_and_the_history_is_never_rewritten(
    renderer: ChatRenderer,
) -> None:
    rng = random.Random(0)
    rewards = [
        (await demonstrations.demonstrate(renderer, task(i), make_base.OPTIONS, rng, 0.35))[2]
        for i in range(150)
    ]
    assert 0.25 < sum(rewards) / 150 < 0.75


def test_any_text_is_read_and_calls_are_hermes(renderer: ChatRenderer) -> None:
    text = 'Error: unknown tool "x"; éß\n{"a": [1, 2]}'
    ids = renderer.tokenizer.encode(text)
    assert renderer.tokenizer.decode(ids).replace("<|unk|>", "?") == text.replace("é", "?").replace(
        "ß", "?"
    )
    called = f"{vocabulary.CALLED[2]}47{vocabulary.CALLED[8]}23{vocabulary.CALLED[9]}"
    assert len(renderer.tokenizer.encode(called)) == 5
    parsed = renderer.parser.parse(called)
    arguments = {"order_id": "#W47", "item_ids": ["i23"], "refund_to": "original_payment"}
    assert parsed.tool_calls == (ToolCall("return_items", arguments),)
