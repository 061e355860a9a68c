"""The training loop: batch, journal, step, publish, report.

Consumes complete groups from the desk; waits until admission lets a step start; unblocked by
arrivals; produces journal entries, versions, checkpoints and step reports.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import torch

from services.learner.checkpoint_files import Facts
from services.learner.checkpointing import Checkpointing
from services.learner.config import LearnerConfig
from services.learner.credit import make_credit
from services.learner.decision import decide_batch
from services.learner.desk import Desk
from services.learner.evaluating import Evaluator
from services.learner.fencing import Fencing
from services.learner.journal_log import JournalLog
from services.learner.positions import Positions
from services.learner.publication import Publication
from services.learner.skips import SkipBound
from services.learner.staging import Scored
from services.learner.step_groups import StepGroups
from services.learner.step_inputs import StepInputs
from services.learner.step_report import headline, step_report
from services.learner.step_telemetry import StepTelemetry
from services.learner.takeover import (
    Recovery,
    check_own_publication,
    load_newest,
    state_digest,
)
from services.learner.ticketing import derive_seed
from services.learner.trainer import StepOutcome, Trainer
from shared.backends.base import Backend
from shared.runtime.context import Context
from shared.weights.publisher import Published
from shared.wire.codec import decode, encode
from shared.wire.journal import Batch, RunFinished, RunStarted
from shared.wire.telemetry import StepReport


class Learner:
    """One learner process on one run."""

    def __init__(
        self,
        context: Context,
        config: LearnerConfig,
        backend: Backend,
        desk: Desk,
        journal: JournalLog,
        publication: Publication,
        inputs: StepInputs,
        positions: Positions,
        fencing: Fencing | None = None,
    ) -> None:
        self._context = context
        self._config = config
        self._backend = backend
        self._desk = desk
        self._journal = journal
        self._publication = publication
        self._inputs = inputs
        self._positions = positions
        self._fencing = fencing
        self._checkpoints = Checkpointing(
            config,
            (backend, inputs),
            context.log,
            on_complete=lambda oldest: journal.state.forget_batches(oldest),
        )
        self._groups = StepGroups(
            desk,
            fencing,
            context.stop,
            drops_stale=config.admission.on_stale == "drop",
            settle=self._checkpoints.settle,
        )
        self._trainer = Trainer(
            backend,
            config.learner,
            temperature=config.sampling.temperature,
            num_ages=config.admission.max_staleness + 1,
            proxy=inputs.route.proxy,
            shadows=inputs.shadows.losses(config.learner.algo.settings(), inputs.route),
        )
        self._credit = make_credit(config.learner.algo)
        self._telemetry = StepTelemetry(context, config)
        self._recovery = Recovery(context, desk, journal, with_scores=inputs.route.waits_for_scores)
        self._previous: dict[str, torch.Tensor] = {}
        """The head's tensors right after a restart: base of the first delta."""
        self._skips = SkipBound(config.learner.max_skipped_steps)
        self._reported = 0
        """Newest version whose report is on the log."""
        self.version = 0
        self.optimizer_steps = 0
        self.evaluator = Evaluator(context, config, desk, journal)

    @property
    def retained_versions(self) -> list[int]:
        """Versions of the checkpoints a restart may go back to."""
        return self._checkpoints.retained_versions

    @property
    def floors(self) -> dict[str, int]:
        """Stream -> lowest sequence that a retained checkpoint may still need; {} = all."""
        return self._checkpoints.floors

    # --- start
    async def take_over(self) -> None:
        """Begin the run, or continue it where the last learner process left off.

        Raises:
            Fatal: the run cannot be continued; the reason names what disagrees.
            Fenced: another learner is at work.
        """
        await self.begin()
        while await self.execute_again():
            pass
        await self._publication.hold()
        await check_own_publication(
            self._context.bus, self._backend, self._context, self._config.weights
        )
        self._desk.admission.version = self.version
        await self._positions.start_at_end()
        await self._recovery.adopt_open_tickets()
        if self._fencing is not None:
            await self._fencing.resume(self.version)
        self._context.set_version(self.version)

    async def begin(self) -> None:
        """Stand at the newest usable checkpoint, or at version 0, as the journal's writer.

        Raises:
            Fatal: the run cannot be continued; the reason names what disagrees.
            Fenced: another learner is at work.
        """
        num_entries = await self._journal.replay()
        state = self._journal.state
        self._checkpoints.store.open(self._run)
        checkpoint = None
        model_digest = state.run.model_digest if state.run else state_digest(self._backend)
        if state.run is not None:
            checkpoint = await asyncio.to_thread(
                load_newest,
                self._checkpoints.store,
                self._backend,
                model_digest,
                load=self._load,
                reload=lambda: self._backend.load_hf(Path(self._config.model.source)),
            )
        if checkpoint is not None:
            self.version = checkpoint.version
            self._checkpoints.restored(checkpoint.version)
            self.optimizer_steps = checkpoint.facts.optimizer_steps
            self._skips.in_a_row = checkpoint.facts.skips_in_a_row
        await self._journal.write(
            RunStarted(
                incarnation=self._context.incarnation,
                seed=self._config.run.seed,
                model_digest=model_digest,
                resumed_from=checkpoint.version if checkpoint else None,
                config=self._config.model_dump(mode="json"),
            )
        )
        # Read the head only now: whoever owned the run before is fenced from here on.
        await self._publication.start()
        self._reported = await self._last_report()
        self._telemetry.warn_of(self._config)
        self._context.log.info(
            "run_taken_over", journal_entries=num_entries, from_version=self.version
        )
        await self._commit(self.version)
        await self._inputs.start()

    async def execute_again(self) -> bool:
        """Execute the journalled batch that leaves the present version; False: there is none."""
        batch = self._journal.state.batches.get(self.version)
        if batch is None:
            return False
        self._previous = {n: t.clone() for n, t in self._backend.state().items()}
        await self._execute(batch, await self._recovery.members(batch), replay=True)
        return True

    def close(self) -> None:
        """Let go of the writing thread."""
        self._checkpoints.close()

    def _load(self, folder: Path) -> None:
        self._backend.load(folder)
        self._inputs.load(folder)

    async def _last_report(self) -> int:
        record = await self._context.bus.last(self._context.bus.subjects.stats("step"))
        return 0 if record is None else decode(record.payload, StepReport).version

    # --- training
    async def train(self) -> None:
        """Train until the last version is published or the context is stopped."""
        await self.evaluator.evaluate("base", 0, head=self.version)
        while self.version < self._config.learner.versions:
            await self.evaluator.evaluate_pinned(self.version)
            groups = await self._groups.next(self.version, self._publication.head_digest)
            if not groups:
                return
            batch = decide_batch(
                groups,
                version=self.version,
                epoch=0,
                seed=derive_seed(self._config.run.seed, "batch", self.version),
                credit=self._credit,
                max_staleness=self._config.admission.max_staleness,
            )
            await self._journal.write(batch)
            await self._execute(batch, self._desk.take(batch), replay=False)
        await self.evaluator.evaluate("final", self.version, head=self.version)

    async def finish(self) -> None:
        """End in order: a checkpoint to go on from, or the journal's last entry.

        After a clean stop nothing has to be replayed, so that a changed learning rate may resume.
        """
        state = self._journal.state
        await self._checkpoints.finish(self.version, self._facts)
        if self.complete and not self.finished:
            unfinished = tuple(
                t.ticket_id for t in state.open_tickets.values() if t.purpose == "train"
            )
            await self._journal.write(RunFinished(version=self.version, unfinished=unfinished))

    @property
    def complete(self) -> bool:
        """Whether the last version is published and evaluated."""
        target = self._config.learner.versions
        evaluated = self._journal.state.evaluation("final", target) is not None
        return self.version == target and (evaluated or not self._config.learner.eval.episodes)

    @property
    def finished(self) -> bool:
        """Whether the journal says so."""
        finished = self._journal.state.finished
        return finished is not None and finished.version == self._config.learner.versions

    async def _execute(self, batch: Batch, members: dict[str, Scored], *, replay: bool) -> None:
        """Perform a journalled batch; on replay nothing is decided again."""
        started_at = time.time()
        with self._context.busy():
            prepared = await self._inputs.prepare(
                batch, members, reported=batch.version < self._reported
            )
            outcome = await asyncio.to_thread(
                self._trainer.step,
                prepared.items,
                version=batch.version,
                seed=batch.seed,
                compare=prepared.compare,
            )
        self._skips.observe(batch.version, outcome.grad_norms)
        old = prepared.old
        self.optimizer_steps += outcome.optimizer_steps
        await self._inputs.stepped(batch.version + 1, outcome)
        self._telemetry.judge(batch.version, outcome, prepared.members, old.fallback_tokens)
        trained_at = time.time()
        published = await self._commit(batch.version + 1)
        self.version = batch.version + 1
        if not replay:
            self._desk.admission.publish(self.version)
            self._context.set_version(self.version)
            self._desk.changed.set()
            if self._fencing is not None:
                await self._fencing.published()
        await self._inputs.store(prepared)
        if self.version > self._reported:
            self._context.count("old_logprobs_s", old.cost.seconds)
            self._context.count("fallback_tokens", old.fallback_tokens)
            outcome.scalars.update(self._inputs.scalars(old))
            fence = self._groups.fence_report
            outcome.scalars.update(fence.scalars() if fence else {})
            self._telemetry.show(outcome)
            report = self._report(batch, members, outcome, published, (started_at, trained_at))
            await self._context.bus.append(
                self._context.bus.subjects.stats("step"),
                encode(report),
                msg_id=f"step{self.version}",
            )
            self._reported = self.version
            self._context.log.info("version", version=self.version, **headline(report.scalars))
        if not replay:
            await self._checkpoints.step(self.version, self._facts)

    async def _commit(self, version: int) -> Published | None:
        result = await self._publication.commit(
            version,
            epoch=0,
            optimizer_steps=self.optimizer_steps,
            previous=self._previous,
        )
        self._previous = {}
        return result if isinstance(result, Published) else None

    def _facts(self) -> Facts:
        return Facts(
            run=self._run,
            version=self.version,
            digest=self._publication.head_digest,
            optimizer_steps=self.optimizer_steps,
            floors=self._positions.floors(self._desk),
            skips_in_a_row=self._skips.in_a_row,
        )

    @property
    def _run(self) -> str:
        """The run's identity: incarnation of the process that began it."""
        run = self._journal.state.run
        return self._context.incarnation if run is None else run.incarnation

    def _report(
        self,
        batch: Batch,
        members: dict[str, Scored],
        outcome: StepOutcome,
        published: Published | None,
        times: tuple[float, float],
    ) -> StepReport:
        dispatched, self._desk.dispatched_lengths = self._desk.dispatched_lengths, []
        self._context.count("skipped_steps", outcome.scalars["skipped_steps"])
        self._context.count("trained_tokens", outcome.scalars["tokens_trained"])
        self._context.count("trained_trajectories", len(members))
        self._context.count("optimizer_steps", outcome.optimizer_steps)
        self._context.count("versions")
        self._context.measured |= self._checkpoints.figures()
        return step_report(
            batch,
            members.values(),
            outcome,
            published,
            times,
            dispatched_lengths=dispatched,
            further={
                "wait_s": self._groups.wait_s,
                **self._checkpoints.scalars(),
                "outstanding_groups": float(len(self._desk.admission.outstanding)),
                "ready_groups": float(len(self._desk.ready)),
                "optimizer_steps": float(self.optimizer_steps),
                **self.evaluator.take_figures(),
            },
        )
