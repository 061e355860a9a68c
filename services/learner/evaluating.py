"""Plays evaluations: held-out tasks, outside admission, each k times, at one version."""

from __future__ import annotations

import asyncio

from services.learner.config import LearnerConfig
from services.learner.desk import Desk
from services.learner.evaluation import EvaluationRound, figures
from services.learner.journal import evaluation_group
from services.learner.journal_log import JournalLog
from shared.runtime.context import Context
from shared.wire.journal import Evaluated

_RECHECK_S = 0.5


class Evaluator:
    """Issues rounds, waits for them and journals their results.

    Base and final rounds are played while training stands still, and so is, with `eval.pin`, one
    during training: all their tokens are of the version evaluated.
    """

    def __init__(
        self, context: Context, config: LearnerConfig, desk: Desk, journal: JournalLog
    ) -> None:
        self._context = context
        self._config = config
        self._desk = desk
        self._journal = journal
        self._figures: dict[str, float] = {}

    async def evaluate(self, name: str, version: int, *, head: int) -> None:
        """Play held-out tasks and journal the result; what an earlier process began is rejoined."""
        section = self._config.learner.eval
        num_episodes = section.progress_episodes if name == "progress" else section.episodes
        done = self._journal.state.evaluation(name, version) is not None
        if done or num_episodes == 0 or version > head:
            return
        if name == "base" and head > 0:
            return  # the base version is gone from the rollouts
        group_id = evaluation_group(name, version)
        round_ = self._desk.rounds.get(group_id) or await self._desk.issue_evaluation(
            name, version, num_episodes
        )
        await self._played(round_)
        if round_.complete:
            result = round_.result()
            await self._journal.write(result)
            del self._desk.rounds[group_id]
            self._tell(result, round_.versions())

    async def evaluate_pinned(self, head: int) -> None:
        """With `eval.pin`, play the evaluation that is due at the head before training goes on."""
        if not self._config.learner.eval.pin:
            return
        due = self.due_progress(head)
        if due is not None and (due == head or self._open_progress()):
            await self.evaluate("progress", due, head=head)

    async def finish_rounds(self) -> None:
        """Wait for the evaluations that others have under way; their tickets have deadlines."""
        while self._desk.rounds and not self._context.stop.is_set():
            await self._something()

    def due_progress(self, head: int) -> int | None:
        """Return the version whose progress evaluation is due now, None when none is.

        One that an earlier process left open comes first.
        """
        if left := self._open_progress():
            return min(left)
        section = self._config.learner.eval
        due = head - head % section.progress_every
        if not section.progress_episodes or due == 0 or due >= self._config.learner.versions:
            return None
        return None if self._journal.state.evaluation("progress", due) else due

    def take_figures(self) -> dict[str, float]:
        """Return the figures of evaluations since the last call, for the step report."""
        taken, self._figures = self._figures, {}
        return taken

    def _open_progress(self) -> list[int]:
        return [r.version for r in self._desk.rounds.values() if r.name == "progress"]

    async def _played(self, round_: EvaluationRound) -> None:
        while not round_.complete and not self._context.stop.is_set():
            await self._something()

    async def _something(self) -> None:
        """Return when something arrived, or the context is stopped."""
        self._desk.changed.clear()
        waits = [
            asyncio.ensure_future(self._desk.changed.wait()),
            asyncio.ensure_future(self._context.stop.wait()),
        ]
        try:
            # The bound: several waiters share the event, and one may clear it for another.
            await asyncio.wait(waits, timeout=_RECHECK_S, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    def _tell(self, result: Evaluated, versions: tuple[int, int]) -> None:
        """Say how it went: in the log, and in the report of the next step."""
        section = self._config.learner.eval
        found = figures(result, section.samples, section.success_reward)
        self._context.log.info(
            "evaluated",
            name=result.name,
            version=result.version,
            versions_sampled=list(versions),
            samples=section.samples,
            episodes=len(result.rewards),
            failed=result.num_failed,
            **{name: round(value, 4) for name, value in found.items()},
        )
        self._figures = {f"eval_{name}": value for name, value in found.items()} | {
            "eval_version": float(result.version)
        }
