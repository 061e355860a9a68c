"""gymnasium environments as text, with the real package, which env agents depend on."""

from __future__ import annotations

from typing import Any

import pytest

from services.env_agents.tasks.gymnasium_text import GymnasiumText, without_escapes
from shared.wire.messages import TaskRef

TAXI: dict[str, Any] = {
    "id": "Taxi-v4",
    "actions": ["south", "north", "east", "west", "pickup", "dropoff"],
}


def task(index: int = 0, split: str = "train") -> TaskRef:
    return TaskRef(dataset="d", split=split, index=index, seed=1)


def describe(observation: Any) -> str:
    return f"state {int(observation)}\n"


async def test_an_ansi_environment_is_shown_as_it_renders_with_colours_written_out() -> None:
    environment = GymnasiumText(TAXI)
    text = (await environment.reset(task())).text
    assert text.startswith("Actions: south, north, east, west, pickup, dropoff\n+---------+\n")
    assert "\x1b" not in text
    assert "(yellow:" in text, "the taxi itself is told by its colour alone"
    assert "(magenta:" in text, "and so is where it is to go"
    result = await environment.step("south\n")
    assert (result.reward, result.terminated, result.truncated) == (-1.0, False, False)
    assert "(South)" in result.observation.text
    await environment.close()


async def test_a_word_that_is_no_action_is_told_and_moves_nothing() -> None:
    environment = GymnasiumText({**TAXI, "describe": f"{__name__}:describe"})
    before = (await environment.reset(task())).text.splitlines()[-1]
    result = await environment.step("jump<|im_end|>")
    assert result.observation.text.startswith("'jump' is no action. Actions: south, north")
    assert (result.reward, result.rewards) == (0.0, {"malformed": 1.0})
    north = await environment.step("north")
    assert (await environment.step("south")).observation.text.strip() == before or (
        north.observation.text.strip() == before
    )


async def test_observations_without_a_rendering_are_plain_python() -> None:
    environment = GymnasiumText({"id": "Blackjack-v1", "actions": ["stick", "hit"], "hidden": True})
    text = (await environment.reset(task())).text
    assert text.startswith("Actions: stick, hit\n(")
    assert "np." not in text
    end = await environment.step("stick")
    assert end.terminated
    assert end.reward in (-1.0, 0.0, 1.0)


async def test_the_environments_own_limit_and_ours_truncate_with_the_reward_real() -> None:
    environment = GymnasiumText({**TAXI, "max_turns": 2})
    await environment.reset(task())
    assert not (await environment.step("north")).truncated
    result = await environment.step("north")
    assert (result.truncated, result.terminated, result.reward) == (True, False, -1.0)


async def test_splits_share_no_start_and_equal_starts_are_equal_tasks() -> None:
    starts: dict[str, dict[str, str]] = {"train": {}, "eval": {}}
    for split, seen in starts.items():
        for index in range(40):
            environment = GymnasiumText(TAXI)
            text = (await environment.reset(task(index, split))).text
            assert seen.setdefault(environment.task_digest(), text) == text
    assert not set(starts["train"]) & set(starts["eval"])
    assert len(starts["train"]) > 25
    hidden = GymnasiumText({**TAXI, "hidden": True})
    await hidden.reset(task())
    assert hidden.task_digest() not in starts["train"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"id": "Nope-v0"}, r"gymnasium\.make\('Nope-v0'\)"),
        ({"id": "Pendulum-v1"}, r"its actions are Box.*not numbered"),
        ({"id": "Taxi-v4", "actions": ["a"]}, "has 6 actions, the option names 1"),
        ({"id": "Taxi-v4", "describe": "json:nope"}, "no such function"),
        ({"id": "Taxi-v4", "kwargs": {"bumpy": 1}}, "bumpy"),
    ],
)
def test_what_cannot_be_played_as_text_is_named(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        GymnasiumText(options)


def test_colours_are_written_out_and_other_escapes_left_out() -> None:
    assert without_escapes("a\x1b[41mS\x1b[0mb") == "a(red:S)b"
    assert without_escapes("\x1b[34;1mR\x1b[0m\x1b[7mx\x1b[0m\x1b[2m") == "(blue:R)(marked:x)"
