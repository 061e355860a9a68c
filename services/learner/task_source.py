"""Where tasks come from: a Protocol, and the source of procedurally generated tasks."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from shared.runtime.sections import TaskSection
from shared.wire.messages import TaskRef


class TaskSource(Protocol):
    """Deals tasks. Deterministic in its seed; its cursor is journalled with what it dealt."""

    def __init__(self, section: TaskSection, seed: int) -> None: ...

    def next_train(self) -> TaskRef:
        """Deal the next training task."""
        ...

    def evaluation(self, num_tasks: int) -> tuple[TaskRef, ...]:
        """Return the first `num_tasks` held-out tasks, always the same ones."""
        ...

    def cursor(self) -> dict[str, Any]:
        """State after the last dealt task, JSON-like."""
        ...

    def restore(self, cursor: dict[str, Any]) -> None: ...


@runtime_checkable
class WatchesOutcomes(Protocol):
    """A task source whose choice of tasks depends on how they went."""

    def outcome(self, task: TaskRef, reward: float) -> None:
        """Take in one training episode, as it arrives; never called for failed ones."""
        ...


class SeededTaskSource:
    """Tasks that an environment generates from (split, seed, index)."""

    def __init__(self, section: TaskSection, seed: int) -> None:
        self._dataset = section.dataset
        self._seed = seed
        self._next_index = 0

    def next_train(self) -> TaskRef:
        task = TaskRef(
            dataset=self._dataset, split="train", index=self._next_index, seed=self._seed
        )
        self._next_index += 1
        return task

    def evaluation(self, num_tasks: int) -> tuple[TaskRef, ...]:
        return tuple(
            TaskRef(dataset=self._dataset, split="eval", index=index, seed=self._seed)
            for index in range(num_tasks)
        )

    def cursor(self) -> dict[str, Any]:
        return {"next_index": self._next_index}

    def restore(self, cursor: dict[str, Any]) -> None:
        self._next_index = int(cursor["next_index"])
