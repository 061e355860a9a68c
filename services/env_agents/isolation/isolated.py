"""An environment that lives in a process of its own, and one that has its own loop there."""

from __future__ import annotations

from typing import Any

from services.env_agents.answer import Answer
from services.env_agents.environment import EnvironmentLost, Observation, StepResult
from services.env_agents.isolation import frames, plain
from services.env_agents.isolation.cells import Cell, Cells
from shared.wire.messages import TaskRef


class EnvironmentRaised(Exception):
    """The environment raised in its process; the text names its own exception."""


class IsolatedEnvironment:
    """One episode, played in a process that is forked for it and killed after it.

    Satisfies `Environment`.

    Args:
        cells: forks the process at `reset`.
    """

    def __init__(self, cells: Cells) -> None:
        self._cells = cells
        self._cell: Cell | None = None
        self._answers = False
        """It has answered its last call: it can be asked to close."""
        self._digest = ""

    async def reset(self, task: TaskRef) -> Observation:
        """Fork, make the environment there, reset it.

        Raises:
            EnvironmentLost: its process ended.
            EnvironmentRaised: it raised.
        """
        self._cell = await self._cells.open()
        answer = await self._call({"call": "reset", "task": task.model_dump()})
        self._digest = answer["digest"]
        return plain.observation(answer["observation"])

    async def step(self, answer: str) -> StepResult:
        """Pass the answer on.

        Raises:
            EnvironmentLost: its process ended.
            EnvironmentRaised: it raised.
        """
        return plain.result(await self._call({"call": "step", "answer": answer}))

    def task_digest(self) -> str:
        return self._digest

    async def close(self) -> None:
        """Close it if it still answers; end its process in any case."""
        cell, self._cell = self._cell, None
        if cell is None:
            return
        try:
            if self._answers:
                await self._ask(cell, {"call": "close"})
        finally:
            await self._cells.close(cell, "was killed at the end of its episode")

    async def _call(self, message: dict[str, Any]) -> dict[str, Any]:
        assert self._cell is not None, "step before reset"
        return await self._ask(self._cell, message)

    async def _ask(self, cell: Cell, message: dict[str, Any]) -> dict[str, Any]:
        self._answers = False
        try:
            cell.writer.write(frames.pack(message))
            await cell.writer.drain()
            answer = await frames.read(cell.reader, self._cells.limits.max_message_bytes)
        except (EOFError, ConnectionError) as error:
            raise EnvironmentLost(f"the environment's process {await cell.ending()}") from error
        self._answers = True
        if "lost" in answer:
            raise EnvironmentLost(answer["lost"])
        if "error" in answer:
            raise EnvironmentRaised(answer["error"])
        return answer


class IsolatedAgent(IsolatedEnvironment):
    """The same for an environment that reads parsed answers: tools, or an agent's own loop.

    Satisfies `ActsOnAnswers` too.
    """

    async def act(self, answer: Answer) -> StepResult:
        """Pass the answer on, tokens and stamps included.

        Raises:
            EnvironmentLost: its process ended.
            EnvironmentRaised: it raised.
        """
        return plain.result(await self._call({"call": "act", "answer": plain.of_answer(answer)}))
