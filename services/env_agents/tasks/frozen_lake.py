r"""gymnasium FrozenLake-v1 as text: procedural maps, held out by content.

The first observation is the map and the position, `SFFF\nFHFF\nFFFF\nHFFG\n@00>`; the policy
answers `left`, `down`, `right` or `up`, the environment with the new position `@rc>` (row,
column). A newline after the word is ignored; any other answer is a wasted turn: the position
stays. Reward 1 at the goal.

A map belongs to the split `eval` if and only if a hash of its *content* falls into the first fifth
of the hash space, otherwise to `train`: splitting by seed would leave most evaluation maps among
the training maps, because there are only some thousand likely maps.
"""

from __future__ import annotations

import copy
import hashlib
from collections import deque
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Literal

from gymnasium.envs.toy_text.frozen_lake import FrozenLakeEnv, generate_random_map

from services.env_agents.environment import Observation, StepResult
from shared.wire.messages import TaskRef

Split = Literal["train", "eval"]

ACTIONS: tuple[str, ...] = ("left", "down", "right", "up")
"""Words in the order of gymnasium's action numbers."""

EVAL_FIFTH = 2**64 // 5

Options = Mapping[str, Any]


class FrozenLake:
    """One episode on one map. Satisfies `Environment`.

    Args:
        options: `size` (4; at most 10, so that a coordinate is one digit), `p` (0.75: share of
            frozen tiles before validity), `max_turns` (10).

    Raises:
        ValueError: an unknown option or one out of range.
    """

    def __init__(self, options: Options) -> None:
        unknown = sorted(set(options) - {"size", "p", "max_turns"})
        if unknown:
            raise ValueError(f"unknown option {unknown[0]!r}; FrozenLake has size, p, max_turns")
        self._size = int(options.get("size", 4))
        self._frozen_share = float(options.get("p", 0.75))
        self._max_turns = int(options.get("max_turns", 10))
        if not (2 <= self._size <= 10 and 0 < self._frozen_share <= 1 and self._max_turns > 0):
            raise ValueError("FrozenLake needs 2 <= size <= 10, 0 < p <= 1 and max_turns > 0")
        self._turns = 0
        self._env: FrozenLakeEnv | None = None
        self._map_text = ""

    async def reset(self, task: TaskRef) -> Observation:
        """Draw the task's map and stand on its start.

        Raises:
            ValueError: the split is neither `train` nor `eval`.
        """
        if task.split not in ("train", "eval"):
            raise ValueError(f"FrozenLake has the splits train and eval, not {task.split!r}")
        self._map_text = draw_map(task.split, task.seed, task.index, self._size, self._frozen_share)
        env = self._env = _episode_env(self._map_text)
        state, _ = env.reset()
        return Observation(f"{self._map_text}\n{self._position(int(state))}")

    async def step(self, answer: str) -> StepResult:
        """Move, or waste the turn when the answer is no direction."""
        assert self._env is not None, "step before reset"
        self._turns += 1
        word = answer.removesuffix("\n")
        if word not in ACTIONS:
            state, reward, terminated = int(self._env.s), 0.0, False
        else:
            moved = self._env.step(ACTIONS.index(word))
            state, reward, terminated = int(moved[0]), float(moved[1]), bool(moved[2])
        return StepResult(
            observation=Observation(self._position(state)),
            reward=reward,
            terminated=terminated,
            truncated=not terminated and self._turns >= self._max_turns,
        )

    def task_digest(self) -> str:
        return map_digest(self._map_text)

    async def close(self) -> None:
        self._env = None

    def _position(self, state: int) -> str:
        return f"@{state // self._size}{state % self._size}>"


def map_digest(map_text: str) -> str:
    """Digest of a map's content: blake2b-64 of its rows, 16 hex digits."""
    return hashlib.blake2b(map_text.encode(), digest_size=8).hexdigest()


def split_of(map_text: str) -> Split:
    """The split that a map belongs to, from its content alone."""
    return "eval" if int(map_digest(map_text), 16) < EVAL_FIFTH else "train"


@lru_cache(maxsize=2048)
def draw_map(split: Split, seed: int, index: int, size: int = 4, frozen_share: float = 0.75) -> str:
    """Draw from (seed, index) until a map of the split appears; its rows, joined by newlines."""
    attempt = 0
    while True:
        draw = hashlib.blake2b(f"{seed}/{index}/{attempt}".encode(), digest_size=8).digest()
        rows = generate_random_map(size=size, p=frozen_share, seed=int.from_bytes(draw, "big") >> 1)
        map_text = "\n".join(rows)
        if split_of(map_text) == split:
            return map_text
        attempt += 1


def expert_actions(map_text: str) -> dict[int, str]:
    """A shortest path's action for every state that can reach the goal, by breadth-first search.

    States are numbered row by row, as gymnasium numbers them; holes and the goal have no action.
    """
    table = _prototype(map_text).P
    holes = {state for state, tile in enumerate(map_text.replace("\n", "")) if tile == "H"}
    goal = map_text.replace("\n", "").index("G")
    parents: dict[int, list[tuple[int, str]]] = {}
    for state, moves in table.items():
        if state in holes or state == goal:
            continue
        for action, word in enumerate(ACTIONS):
            parents.setdefault(int(moves[action][0][1]), []).append((int(state), word))
    best: dict[int, str] = {}
    frontier = deque([goal])
    while frontier:
        for state, word in parents.get(frontier.popleft(), []):
            if state not in best:
                best[state] = word
                frontier.append(state)
    return best


def _episode_env(map_text: str) -> FrozenLakeEnv:
    """An environment of its own at the cost of a copy: the transition table is shared."""
    return copy.copy(_prototype(map_text))


@lru_cache(maxsize=2048)
def _prototype(map_text: str) -> FrozenLakeEnv:
    # Without gymnasium.make: its wrappers and registry cost ten times the transition itself.
    env = FrozenLakeEnv(desc=map_text.split("\n"), is_slippery=False)
    env.reset(seed=0)
    return env
