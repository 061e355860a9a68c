"""reasoning-gym tasks, with the real package."""

from __future__ import annotations

from typing import Any

import pytest

from services.env_agents.tasks.reasoning_gym_task import ReasoningGymTask
from tests.real_packages.servers import task


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("leg_counting", {}),
        ("basic_arithmetic", {"max_terms": 2}),
        ("countdown", {}),
        ("spell_backward", {"max_word_len": 6}),
    ],
)
async def test_the_data_sets_own_answer_is_worth_one_and_another_less(
    name: str, config: dict[str, Any]
) -> None:
    for answer, judged in (("right", True), ("wrong", False)):
        environment = ReasoningGymTask({"dataset": name, "config": config})
        await environment.reset(task(5))
        said = environment._drawn["answer"] if answer == "right" else "no idea"
        result = await environment.step(f"<think>so</think><answer>{said}</answer><|im_end|>")
        assert result.terminated
        assert (result.reward == 1.0) is judged


async def test_train_and_eval_have_no_question_in_common_and_seeds_repeat() -> None:
    async def asked(split: str) -> set[str]:
        texts: set[str] = set()
        for index in range(60):
            environment = ReasoningGymTask(
                {"dataset": "basic_arithmetic", "config": {"max_terms": 2, "max_digits": 1}}
            )
            texts.add((await environment.reset(task(index, split))).text)
        return texts

    train, held_out = await asked("train"), await asked("eval")
    assert len(train) > 20
    assert not train & held_out
    assert await asked("eval") == held_out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "needs the option dataset"),
        ({"dataset": "nope"}, "reasoning-gym nope: Dataset 'nope' not registered"),
        ({"dataset": "leg_counting", "config": {"x": 1}}, "unexpected keyword argument 'x'"),
        ({"dataset": "leg_counting", "config": {"seed": 1}}, "come from the task"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ReasoningGymTask(options)
