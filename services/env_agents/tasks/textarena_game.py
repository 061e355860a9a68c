"""A textarena game for one player, or against a scripted opponent.

What has been said since the policy last acted is the observation. Games that need corpora from
the network (Wordle, Hangman: nltk) fail at reset, by name.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from services.env_agents.answers import without_stop
from services.env_agents.environment import Observation, StepResult
from services.env_agents.tasks.drawing import content_digest
from services.env_agents.tasks.options import checked, function, installed
from shared.wire.messages import TaskRef

OPTIONS: Mapping[str, Any] = {"game": ..., "kwargs": {}, "opponent": "", "max_turns": 50}

OURS = 0
"""Our player."""


class TextArenaGame:
    """One episode. Satisfies `Environment`.

    Args:
        options: `game` (an id such as `GuessTheNumber-v0`), `kwargs` (for `textarena.make`),
            `opponent` (`package.module:function` from what it sees to its answer, for games of
            two), `max_turns` (50).

    Raises:
        ValueError: an unknown option, or no such game.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        chosen = checked("TextArenaGame", options, OPTIONS)
        textarena = installed("textarena", "textarena")
        self._game = str(chosen["game"])
        self._opponent = function(chosen["opponent"]) if chosen["opponent"] else None
        self._max_turns = int(chosen["max_turns"])
        try:
            # Raw: other variants repeat the whole history in every observation.
            self._env: Any = textarena.make(env_id=f"{self._game}-raw", **dict(chosen["kwargs"]))
        except Exception as error:
            raise ValueError(f"textarena {self._game}: {_line(error)}") from error
        self._turns = 0
        self._digest = ""
        self._random = _OwnRandom()

    async def reset(self, task: TaskRef) -> Observation:
        """Start the game whose hidden state the task's split, seed and index determine.

        Raises:
            ValueError: the game cannot be started here.
        """
        self._digest = content_digest(self._game, task.split, str(task.seed), str(task.index))
        seed = int(self._digest, 16) >> 33
        self._random.seed(seed)
        with self._random:
            try:
                self._env.reset(num_players=2 if self._opponent else 1, seed=seed)
            except Exception as error:
                raise ValueError(f"textarena {self._game}: {_line(error)}") from error
            self._let_opponent_play()
        return Observation(self._heard())

    async def step(self, answer: str) -> StepResult:
        """Say it to the game."""
        self._turns += 1
        with self._random:
            done, _ = self._env.step(action=without_stop(answer))
            done = bool(done) or self._let_opponent_play()
            if done:
                return self._over()
        late = self._turns >= self._max_turns
        return StepResult(Observation(self._heard()), truncated=late)

    def task_digest(self) -> str:
        return self._digest

    async def close(self) -> None:
        self._env = None

    def _over(self) -> StepResult:
        rewards, info = self._env.close()
        reward = float((rewards or {}).get(OURS, 0.0))
        invalid = bool((info or {}).get(OURS, {}).get("invalid_move", False))
        return StepResult(
            Observation(""),
            reward=reward,
            terminated=True,
            rewards={"malformed": 1.0} if invalid else {},
        )

    def _let_opponent_play(self) -> bool:
        """Play the other side's turns; True: the game is over."""
        while self._env.state.current_player_id != OURS:
            _, seen = self._env.get_observation()
            assert self._opponent is not None, "a game for one has no other side"
            done, _ = self._env.step(action=str(self._opponent(_said(seen))))
            if done:
                return True
        return False

    def _heard(self) -> str:
        _, seen = self._env.get_observation()
        return _said(seen)


class _OwnRandom:
    """Games draw from the global generator: each episode gets a state of its own in it."""

    def __init__(self) -> None:
        self._inner: Any = random.getstate()
        self._outer: Any = None

    def seed(self, seed: int) -> None:
        self._inner = random.Random(seed).getstate()

    def __enter__(self) -> None:
        self._outer = random.getstate()
        random.setstate(self._inner)

    def __exit__(self, *_: object) -> None:
        self._inner = random.getstate()
        random.setstate(self._outer)


def _said(seen: Any) -> str:
    """Everything but the policy's own words, which it has on its sequence already."""
    if isinstance(seen, str):
        return seen
    told = [str(message[1]) for message in seen if message[0] != OURS]
    return "\n".join(told) + "\n"


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split()).strip("* ")
    return f"{type(error).__name__}: {text[:200]}"
