"""textarena games that work offline, with the real package."""

from __future__ import annotations

import itertools
import random

import pytest

from services.env_agents.tasks.textarena_game import TextArenaGame
from tests.real_packages.servers import task


async def guess(index: int, order: list[int]) -> tuple[float, int]:
    """Reward and turns of naming numbers in an order."""
    game = TextArenaGame({"game": "GuessTheNumber-v0"})
    await game.reset(task(index))
    for turn, number in enumerate(order):
        result = await game.step(f"I say [{number}]<|im_end|>")
        if result.terminated:
            return result.reward, turn
    raise AssertionError("unreachable")


async def test_guess_the_number_is_won_by_halving() -> None:
    game = TextArenaGame({"game": "GuessTheNumber-v0"})
    assert "between 1 and 20" in (await game.reset(task())).text
    low, high = 1, 20
    for _ in range(6):
        middle = (low + high) // 2
        result = await game.step(f"[{middle}]")
        if result.terminated:
            assert (result.reward, dict(result.rewards)) == (1.0, {})
            return
        # Only what is new, so that a history only grows.
        assert len(result.observation.text) < 60
        if "higher" in result.observation.text:
            low = middle + 1
        else:
            high = middle - 1
    raise AssertionError("six guesses find one of twenty")


async def test_the_task_determines_the_game_whatever_else_draws_random_numbers() -> None:
    order = list(range(1, 21))
    once = [await guess(index, order) for index in range(8)]
    random.seed(1)
    again = [await guess(index, order) for index in range(8)]
    assert once == again
    assert len(set(once)) > 2


async def test_a_game_leaves_the_generator_of_others_alone() -> None:
    random.seed(5)
    alone = [random.random() for _ in range(2)]
    random.seed(5)
    first = random.random()
    await guess(0, list(range(1, 21)))
    assert [first, random.random()] == alone


@pytest.mark.parametrize(
    ("name", "answers"),
    [
        ("TowerOfHanoi-v0", ["[A C]", "[A B]", "[C B]", "[A C]", "[B A]", "[B C]", "[A C]"]),
        ("Mastermind-v0", [f"[{' '.join(p)}]" for p in itertools.permutations("123456", 4)][:60]),
        ("Sokoban-v0", ["[up]", "[left]", "[down]", "[right]"] * 40),
    ],
)
async def test_offline_games_are_played_to_an_end(name: str, answers: list[str]) -> None:
    game = TextArenaGame({"game": name, "max_turns": 100})
    await game.reset(task())
    for answer in answers:
        result = await game.step(answer)
        if result.terminated or result.truncated:
            assert 0.0 <= result.reward <= 1.0
            if name.startswith("Tower"):
                assert result.reward == 1.0
            return
    raise AssertionError("it ends")


async def test_two_wrong_moves_end_a_game_and_are_called_malformed() -> None:
    game = TextArenaGame({"game": "TowerOfHanoi-v0"})
    await game.reset(task())
    assert not (await game.step("hello")).terminated
    result = await game.step("hello")
    assert (result.terminated, dict(result.rewards)) == (True, {"malformed": 1.0})


def take_one(seen: str) -> str:
    """An opponent for Nim that takes one from the first pile that the board shows."""
    board = seen.rsplit("Current Pile", 1)[-1]
    for pile in range(3):
        if f"pile {pile}: 0" not in board.lower():
            return f"[{pile} 1]"
    return "[0 1]"


async def test_a_game_for_two_is_played_against_a_scripted_opponent() -> None:
    path = "tests.real_packages.test_textarena:take_one"
    game = TextArenaGame({"game": "Nim-v0", "opponent": path})
    first = (await game.reset(task())).text
    assert "Player 0" in first
    result = await game.step("[0 3]")
    assert "Player 1 removes 1 from pile 1" in result.observation.text
    assert "[0 3]" not in result.observation.text, "its own words the policy has already"


async def test_a_game_that_is_not_there_or_needs_a_download_is_named() -> None:
    with pytest.raises(ValueError, match="textarena Nope-v0: "):
        TextArenaGame({"game": "Nope-v0"})
    with pytest.raises(ValueError, match="unknown option 'gmae'"):
        TextArenaGame({"gmae": "x"})
