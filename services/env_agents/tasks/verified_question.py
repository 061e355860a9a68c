"""One question, one answer, judged by a verifier: tasks that a task source ships."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from services.env_agents.answers import without_stop
from services.env_agents.environment import Observation, StepResult
from services.env_agents.tasks.drawing import content_digest
from services.env_agents.tasks.options import checked
from services.env_agents.verifiers.verifier import TaskFault, verifier
from shared.wire.messages import TaskRef

OPTIONS: Mapping[str, Any] = {"verifier": ..., "verifier_options": {}, "prompt": "{question}\n"}


class VerifiedQuestion:
    """One episode of one turn. Satisfies `Environment`.

    The task's payload has `question` and what the verifier needs (`answer`, or `tests`).

    Args:
        options: `verifier` (`exact`, `maths`, `unit_tests` or `package.module:Class`),
            `verifier_options`, `prompt` (`{question}` stands for the question).

    Raises:
        ValueError: an unknown option, or a verifier that cannot be used.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        chosen = checked("VerifiedQuestion", options, OPTIONS)
        self._verifier = verifier(str(chosen["verifier"]), dict(chosen["verifier_options"]))
        self._prompt = str(chosen["prompt"])
        self._payload: Mapping[str, Any] = {}

    async def reset(self, task: TaskRef) -> Observation:
        """Ask.

        Raises:
            TaskFault: the task has no question.
        """
        self._payload = task.payload
        question = task.payload.get("question")
        if not isinstance(question, str) or not question:
            raise TaskFault(f"the task {task.split}/{task.index} has no `question`")
        return Observation(self._prompt.replace("{question}", question))

    async def step(self, answer: str) -> StepResult:
        """Judge the answer.

        Raises:
            TaskFault: the task cannot be judged.
        """
        verdict = await self._verifier.verify(without_stop(answer), self._payload)
        return StepResult(
            Observation(""), reward=verdict.reward, terminated=True, rewards=verdict.rewards
        )

    def task_digest(self) -> str:
        return content_digest(json.dumps(self._payload, sort_keys=True, default=str))

    async def close(self) -> None:
        self._payload = {}
