"""Environments people have: the Protocol, options, and what a missing package says.

Against the real packages they are tested by `make test-envs` (tests/real_packages).
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from typing import Any

import pytest

from services.env_agents.loading import environment_class
from services.env_agents.tasks.drawing import EVAL_FIFTH, content_digest, draw
from services.env_agents.tasks.options import checked, function
from services.env_agents.verifiers import maths
from services.env_agents.verifiers.verifier import TaskFault
from shared.runtime.errors import ConfigError
from shared.wire.messages import TaskRef

PACKAGE = "services.env_agents.tasks"
ADAPTERS: dict[str, tuple[dict[str, Any], str, str]] = {
    "textarena_game:TextArenaGame": ({"game": "x"}, "textarena", "textarena"),
    "reasoning_gym_task:ReasoningGymTask": ({"dataset": "x"}, "reasoning_gym", "reasoning-gym"),
    "openenv_client:OpenEnvClient": ({"url": "http://x"}, "websockets.asyncio.client", "openenv"),
    "mcp_tools:McpTools": ({"url": "http://x", "verifier": "exact"}, "mcp", "mcp"),
    "gymnasium_text:GymnasiumText": ({"id": "x"}, "gymnasium", "env-agents"),
}


def task(index: int = 0, split: str = "train", **payload: object) -> TaskRef:
    return TaskRef(dataset="d", split=split, index=index, seed=1, payload=payload)


@pytest.mark.parametrize("path", ADAPTERS)
def test_a_package_that_is_not_installed_is_named_with_the_extra_that_brings_it(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, module, extra = ADAPTERS[path]
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError) as refusal:
        environment_class(f"{PACKAGE}.{path}", options)
    assert f"{module} cannot be imported: pip install 'lagwise[{extra}]'" in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("path", [*ADAPTERS, "verified_question:VerifiedQuestion"])
def test_an_unknown_option_is_named_before_anything_is_imported(path: str) -> None:
    with pytest.raises(ConfigError, match="unknown option 'typo'"):
        environment_class(f"{PACKAGE}.{path}", {"typo": 1})


def test_an_option_that_must_be_given_is_named() -> None:
    with pytest.raises(ValueError, match="X needs the option a"):
        checked("X", {"b": 1}, {"a": ..., "b": 2})
    assert checked("X", {"a": 1}, {"a": ..., "b": 2}) == {"a": 1, "b": 2}


def test_a_function_is_found_by_path() -> None:
    assert function("json:dumps") is json.dumps
    with pytest.raises(ValueError, match="no such function"):
        function("json:nope")
    with pytest.raises(ValueError, match="No module named"):
        function("no_such_module_here:x")


def test_splits_are_disjoint_by_content_and_a_task_is_the_same_every_time() -> None:
    def drawn(split: str, index: int) -> int:
        return draw(task(index, split), lambda seed: seed % 50, lambda n: content_digest(str(n)))

    train = Counter(drawn("train", index) for index in range(300))
    held_out = Counter(drawn("eval", index) for index in range(300))
    assert set(train) | set(held_out) == set(range(50))
    assert not set(train) & set(held_out)
    assert all(int(content_digest(str(n)), 16) < EVAL_FIFTH for n in held_out)
    assert held_out == Counter(drawn("eval", index) for index in range(300))


def test_a_split_that_is_empty_or_unknown_is_named() -> None:
    lonely = content_digest("only")
    empty = "train" if int(lonely, 16) < EVAL_FIFTH else "eval"
    with pytest.raises(ValueError, match=f"none of 1000 tasks drawn belongs to the split {empty}"):
        draw(task(split=empty), lambda _: "only", content_digest)
    with pytest.raises(ValueError, match="not 'test'"):
        draw(task(split="test"), lambda _: "only", content_digest)


async def test_a_question_is_asked_and_its_answer_judged() -> None:
    made = environment_class(f"{PACKAGE}.verified_question:VerifiedQuestion", {"verifier": "exact"})
    environment = made({"verifier": "exact", "prompt": "Q: {question}\nA: "})
    shipped = task(question="2 + 3?", answer="5")
    assert (await environment.reset(shipped)).text == "Q: 2 + 3?\nA: "
    digest = environment.task_digest()
    assert (await environment.step("5<|im_end|>")).reward == 1.0
    assert (await environment.step("6")).reward == 0.0
    again = made({"verifier": "exact"})
    await again.reset(task(7, question="2 + 3?", answer="5"))
    assert again.task_digest() == digest, "equal tasks have equal digests"
    with pytest.raises(TaskFault, match="train/0 has no `question`"):
        await again.reset(task())


def test_a_verifier_that_does_not_exist_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="verifier 'exakt': neither one of exact, maths"):
        environment_class(f"{PACKAGE}.verified_question:VerifiedQuestion", {"verifier": "exakt"})


def test_a_verifier_whose_library_is_missing_names_the_extra_that_brings_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(maths, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"pip install 'lagwise\[maths\]'"):
        maths.Maths({})
