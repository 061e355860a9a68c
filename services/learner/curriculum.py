"""Which task of a list is dealt next: shuffled epochs, or a curriculum that watches rewards.

Pure. What a curriculum knows is journalled with the cursor, so that a restarted learner deals what
the old one would have dealt.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Protocol

Task = Mapping[str, Any]


class Curriculum(Protocol):
    """Chooses among the training tasks."""

    def __init__(self, tasks: Sequence[Task], seed: int, options: Mapping[str, Any]) -> None:
        """`options` is `task.source_options.curriculum_options`."""
        ...

    def choose(self, position: int) -> int:
        """Return the index of the task dealt as number `position` of the run."""
        ...

    def outcome(self, index: int, reward: float) -> None:
        """Take in one episode's reward. Order and number are the world's: never rely on them."""
        ...

    def state(self) -> dict[str, Any]:
        """What `choose` depends on beside its arguments, JSON-like."""
        ...

    def restore(self, state: dict[str, Any]) -> None: ...


class Shuffled:
    """Every task once per epoch, in an order fixed by (seed, epoch). Satisfies `Curriculum`."""

    def __init__(self, tasks: Sequence[Task], seed: int, options: Mapping[str, Any]) -> None:
        self._num_tasks = len(tasks)
        self._in_order = bool(options.get("in_order", False))
        self._seed = seed

    def choose(self, position: int) -> int:
        epoch, place = divmod(position, self._num_tasks)
        if self._in_order:
            return place
        return permutation(self._num_tasks, f"{self._seed}/{epoch}")[place]

    def outcome(self, index: int, reward: float) -> None:
        pass

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        pass


class Graded:
    """Levels in ascending order: the next one opens when the open ones are mastered.

    Args:
        tasks: each has the field `options["field"]` (default `level`), a number.
        seed: of the draws among open tasks.
        options: `field`; `threshold` (0.7: mean reward that opens the next level), `window` (64:
            episodes of the highest open level that the mean is taken over).

    Raises:
        ValueError: a task without a numeric level.
    """

    def __init__(self, tasks: Sequence[Task], seed: int, options: Mapping[str, Any]) -> None:
        key = str(options.get("field", "level"))
        self._threshold = float(options.get("threshold", 0.7))
        window = int(options.get("window", 64))
        for index, task in enumerate(tasks):
            if not isinstance(task.get(key), int | float):
                raise ValueError(f"task {index} has no number in its field {key!r}")
        self._levels = [float(task[key]) for task in tasks]
        self._ladder = sorted(set(self._levels))
        self._open = 1
        """Levels that may be dealt."""
        self._recent: deque[float] = deque(maxlen=window)
        self._seed = seed

    def choose(self, position: int) -> int:
        top = self._ladder[self._open - 1]
        allowed = [index for index, level in enumerate(self._levels) if level <= top]
        return random.Random(f"{self._seed}/{position}").choice(allowed)

    def outcome(self, index: int, reward: float) -> None:
        if self._levels[index] != self._ladder[self._open - 1]:
            return
        self._recent.append(reward)
        full = len(self._recent) == self._recent.maxlen
        if full and sum(self._recent) / len(self._recent) >= self._threshold:
            self._open = min(self._open + 1, len(self._ladder))
            self._recent.clear()

    def state(self) -> dict[str, Any]:
        return {"open": self._open, "recent": list(self._recent)}

    def restore(self, state: dict[str, Any]) -> None:
        self._open = int(state["open"])
        self._recent = deque(state["recent"], maxlen=self._recent.maxlen)


@lru_cache(maxsize=4)
def permutation(length: int, seed: str) -> tuple[int, ...]:
    """Return a permutation of range(length) fixed by `seed`."""
    order = list(range(length))
    random.Random(seed).shuffle(order)
    return tuple(order)
