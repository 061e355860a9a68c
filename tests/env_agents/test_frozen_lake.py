"""FrozenLake as text: gymnasium's rules, splits by content, an expert."""

from __future__ import annotations

import time

import gymnasium
import pytest

from services.env_agents.environment import StepResult
from services.env_agents.tasks.frozen_lake import (
    ACTIONS,
    FrozenLake,
    draw_map,
    expert_actions,
    map_digest,
    split_of,
)
from shared.wire.messages import TaskRef


def task(index: int, split: str = "train", seed: int = 5) -> TaskRef:
    return TaskRef(dataset="frozen_lake", split=split, index=index, seed=seed)


async def walk(env: FrozenLake, *words: str) -> StepResult:
    for word in words:
        result = await env.step(word)
    return result


async def test_the_prompt_is_the_map_and_the_start() -> None:
    env = FrozenLake({})
    text = (await env.reset(task(0))).text
    rows = text.split("\n")
    assert [len(row) for row in rows] == [4, 4, 4, 4, 4]
    assert rows[0][0] == "S"
    assert rows[3][3] == "G"
    assert rows[4] == "@00>"
    assert set("".join(rows[:4])) <= set("SFHG")


async def test_moves_agree_with_gymnasium_made_by_its_registry() -> None:
    for index in range(20):
        env = FrozenLake({"max_turns": 1000})
        text = (await env.reset(task(index))).text
        reference = gymnasium.make("FrozenLake-v1", desc=text.split("\n")[:4], is_slippery=False)
        reference.reset(seed=0)
        for step in range(60):
            action = (7 * step + step * step // 3 + index) % 4
            mine = await env.step(ACTIONS[action] + "\n")
            state, reward, terminated, _, _ = reference.step(action)
            assert mine.observation.text == f"@{state // 4}{state % 4}>"
            assert (mine.reward, mine.terminated) == (reward, terminated)
            if terminated:
                break
        reference.close()


@pytest.mark.parametrize("answer", ["sideways\n", "\n", "", "rightx\n", " down\n", "right\n\n"])
async def test_an_invalid_word_wastes_the_turn_and_leaves_the_position(answer: str) -> None:
    env = FrozenLake({"max_turns": 2})
    await env.reset(task(0))
    result = await env.step(answer)
    assert (result.observation.text, result.reward, result.terminated) == ("@00>", 0.0, False)
    assert not result.truncated
    assert (await env.step(answer)).truncated, "it was a turn"


async def test_the_tenth_turn_truncates() -> None:
    env = FrozenLake({})
    await env.reset(task(0))
    results = [await env.step("left\n") for _ in range(10)]
    assert [result.truncated for result in results] == [False] * 9 + [True]


async def test_the_expert_reaches_the_goal_of_every_map_for_reward_one() -> None:
    for index in range(50):
        env = FrozenLake({})
        text = (await env.reset(task(index, "eval"))).text
        expert = expert_actions(text.rsplit("\n", 1)[0])
        state = 0
        for _ in range(10):
            result = await env.step(expert[state] + "\n")
            if result.terminated:
                break
            state = 4 * int(result.observation.text[1]) + int(result.observation.text[2])
        assert (result.reward, result.terminated) == (1.0, True)


async def test_episodes_on_one_map_do_not_disturb_each_other() -> None:
    first, second = FrozenLake({}), FrozenLake({})
    text = (await first.reset(task(3))).text
    assert (await second.reset(task(3))).text == text
    word = expert_actions(text.rsplit("\n", 1)[0])[0] + "\n"
    moved = await first.step(word)
    stayed = await second.step("nowhere\n")
    assert moved.observation.text != "@00>"
    assert stayed.observation.text == "@00>"


def test_train_and_eval_contents_are_disjoint_and_about_four_to_one() -> None:
    train = {draw_map("train", seed, index) for seed in (0, 1) for index in range(400)}
    evaluation = {draw_map("eval", seed, index) for seed in (0, 1) for index in range(200)}
    assert not train & evaluation
    assert {split_of(text) for text in train} == {"train"}
    assert {split_of(text) for text in evaluation} == {"eval"}
    maps = {draw_map("train", 9, i) for i in range(200)}
    maps |= {draw_map("eval", 9, i) for i in range(200)}
    digests = {map_digest(text) for text in maps}
    assert len(digests) == len(maps)


def test_the_eval_split_is_a_fifth_of_the_content() -> None:
    tiles = [f"{bits:014b}".replace("0", "F").replace("1", "H") for bits in range(4000)]
    texts = [f"S{t[:3]}\n{t[3:7]}\n{t[7:11]}\n{t[11:]}G" for t in tiles]
    share = sum(split_of(text) == "eval" for text in texts) / len(texts)
    assert share == pytest.approx(0.2, abs=0.02)


async def test_the_task_digest_is_of_the_content_whatever_seed_led_to_it() -> None:
    by_text: dict[str, set[str]] = {}
    seeds: dict[str, set[int]] = {}
    for seed in range(3):
        for index in range(150):
            env = FrozenLake({})
            text = (await env.reset(task(index, "eval", seed))).text
            by_text.setdefault(text, set()).add(env.task_digest())
            seeds.setdefault(text, set()).add(seed)
    assert any(len(found) > 1 for found in seeds.values()), "some map was drawn by two seeds"
    assert all(len(digests) == 1 for digests in by_text.values())
    assert len({next(iter(d)) for d in by_text.values()}) == len(by_text)


def test_a_task_is_determined_by_split_seed_and_index() -> None:
    drawn = [draw_map("train", 1, index) for index in range(20)]
    draw_map.cache_clear()
    assert [draw_map("train", 1, index) for index in range(20)] == drawn
    assert draw_map("train", 2, 0) != drawn[0]


async def test_an_unknown_split_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="'test'"):
        await FrozenLake({}).reset(task(0, "test"))


@pytest.mark.parametrize(
    ("options", "named"),
    [({"sise": 4}, "sise"), ({"size": 11}, "size"), ({"p": 0}, "p"), ({"max_turns": 0}, "turns")],
)
def test_bad_options_are_refused_by_name(options: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        FrozenLake(options)


async def test_a_step_costs_well_below_a_millisecond() -> None:
    env = FrozenLake({"max_turns": 10_000})
    await env.reset(task(0))
    started = time.perf_counter()
    for _ in range(500):
        await env.step("left\n")
    assert (time.perf_counter() - started) / 500 < 5e-4
