"""A task of reasoning-gym: one question, one answer, scored by the data set's own scorer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from services.env_agents.answers import tagged, without_stop, without_thought
from services.env_agents.environment import Observation, StepResult
from services.env_agents.tasks.drawing import content_digest, draw
from services.env_agents.tasks.options import checked, installed
from shared.wire.messages import TaskRef

OPTIONS: Mapping[str, Any] = {"dataset": ..., "config": {}, "prompt": "{question}\n"}


class ReasoningGymTask:
    """One episode of one turn. Satisfies `Environment`.

    What stands between <answer> and </answer> is scored, or all of an answer that has no such
    tags; thinking is left out.

    Args:
        options: `dataset` (a name such as `leg_counting`), `config` (its fields), `prompt`
            (`{question}` stands for the question).

    Raises:
        ValueError: an unknown option or data set, or one that refuses the config.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        chosen = checked("ReasoningGymTask", options, OPTIONS)
        self._name = str(chosen["dataset"])
        self._config = dict(chosen["config"])
        if {"seed", "size"} & set(self._config):
            raise ValueError("config: `seed` and `size` come from the task, leave them out")
        self._prompt = str(chosen["prompt"])
        self._gym = installed("reasoning_gym", "reasoning-gym")
        self._dataset(0)
        self._drawn: Any = None
        self._scorer: Any = None
        self._digest = ""

    async def reset(self, task: TaskRef) -> Observation:
        """Draw a question of the split.

        Raises:
            ValueError: no such split, or it is empty.
        """

        def make(seed: int) -> tuple[Any, Any]:
            dataset = self._dataset(seed)
            return dataset, dataset[0]

        def content(drawn: tuple[Any, Any]) -> str:
            return content_digest(self._name, str(drawn[1]["question"]))

        drawn = draw(task, make, content)
        self._scorer, self._drawn = drawn
        self._digest = content(drawn)
        return Observation(self._prompt.replace("{question}", str(self._drawn["question"])))

    async def step(self, answer: str) -> StepResult:
        """Score the answer."""
        assert self._drawn is not None, "step before reset"
        given = tagged(answer)
        if given is None:
            given = without_thought(without_stop(answer)).strip()
        score = float(self._scorer.score_answer(given, self._drawn))
        return StepResult(Observation(""), reward=score, terminated=True)

    def task_digest(self) -> str:
        return self._digest

    async def close(self) -> None:
        self._drawn = self._scorer = None

    def _dataset(self, seed: int) -> Any:
        try:
            return self._gym.create_dataset(self._name, seed=seed, size=1, **self._config)
        except Exception as error:
            raise ValueError(f"reasoning-gym {self._name}: {error}") from error
