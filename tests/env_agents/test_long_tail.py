"""Lengths have the mean and the tail that were asked for, and come from what was sampled."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from services.env_agents.tasks.long_tail import ALPHABET, Letters, LongTail, lengths
from shared.wire.messages import TaskRef


def play(index: int, rng: np.random.Generator, **options: object) -> tuple[int, int, float]:
    """Play with random letters; return sampled tokens, turns and the reward."""

    async def run() -> tuple[int, int, float]:
        env = LongTail(options)
        task = TaskRef(dataset="long_tail", split="train", index=index, seed=0)
        observation, tokens, turns = await env.reset(task), 0, 0
        while True:
            assert observation.max_new_tokens
            answer = "".join(rng.choice(list(ALPHABET), observation.max_new_tokens))
            result = await env.step(answer)
            tokens, turns = tokens + len(answer), turns + 1
            if result.terminated:
                return tokens, turns, result.reward
            observation = result.observation

    return asyncio.run(run())


@pytest.mark.parametrize("ratio", [1, 2, 4, 8])
def test_lengths_have_the_mean_and_the_tail_asked_for(ratio: int) -> None:
    short, long = lengths(128, ratio)
    assert long == 128 * ratio
    share = 0 if ratio == 1 else 1 / (2 * ratio)
    assert abs((1 - share) * short + share * long - 128) < 1
    rng = np.random.default_rng(ratio)
    played = [play(i, rng, mean_tokens=128, tail_ratio=ratio)[0] for i in range(400)]
    assert set(played) == {short, long}
    assert abs(np.mean([p == long for p in played]) - (share or 1)) < 0.08


def test_one_task_has_both_lengths_so_that_groups_do() -> None:
    rng = np.random.default_rng(0)
    assert len({play(7, rng, tail_ratio=2)[0] for _ in range(40)}) == 2


def test_the_reward_is_the_share_of_good_letters() -> None:
    async def run(letter: str) -> float:
        env = LongTail({"mean_tokens": 32, "turn_tokens": 32})
        await env.reset(TaskRef(dataset="x", split="train", index=0, seed=0))
        return (await env.step(letter * 32)).reward

    assert asyncio.run(run("a")) == 1
    assert asyncio.run(run("z")) == 0


def test_letters_are_one_token_each_and_nothing_ends_an_answer() -> None:
    renderer = Letters("", {})
    assert renderer.stop_ids == ()
    assert renderer.decode(renderer.prompt(ALPHABET)) == ALPHABET


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"tail": 2}, "unknown option 'tail'"),
        ({"tail_ratio": 0.5}, "tail_ratio >= 1"),
        ({"turn_tokens": 100, "tail_ratio": 8}, r"short episodes' length \(68\)"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, object], pattern: str) -> None:
    with pytest.raises(ValueError, match=pattern):
        LongTail(options)
