"""The shell of the learner: loops around the desk, each with its own stream or clock.

terminals: consumes `terminals`, produces arrivals. scores: consumes `scores`, produces arrivals.
issuing: waits for room in admission, unblocked by publications and releases, produces tickets.
deadlines: once a second, produces failed terminals. control: once a second, produces the control
document and purges what is archived. training: see learner.py.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable
from contextlib import aclosing
from functools import partial
from typing import Literal

from services.learner.building import (
    load_backend,
    load_task_source,
    make_inputs,
    meet_ranks,
)
from services.learner.completing import Completer
from services.learner.config import LearnerConfig
from services.learner.deadlines import Pauses, deadline_terminal, overdue
from services.learner.desk import Desk
from services.learner.fencing import Fencing
from services.learner.journal_log import JournalLog
from services.learner.keyframing import Keyframing
from services.learner.learner import Learner
from services.learner.positions import Positions
from services.learner.publication import Publication, Slack
from services.learner.purging import Purging
from services.learner.score_records import score_event
from services.learner.step_telemetry import bounds
from services.learner.takeover import terminal_event
from services.learner.task_source import TaskSource
from shared.backends.base import Backend
from shared.backends.expert_layers import replayed
from shared.backends.objection import objection
from shared.backends.ranks import Ranks
from shared.runtime.bus import Record
from shared.runtime.context import Context
from shared.runtime.errors import BusError, Conflict
from shared.runtime.intake import accept
from shared.runtime.leases import LeaseBoard
from shared.runtime.peers import unless_lost
from shared.weights.assembly import make_publisher
from shared.weights.retention import oldest_needed
from shared.wire.codec import encode
from shared.wire.errors import ForeignMajor
from shared.wire.messages import Score
from shared.wire.subjects import STREAMS
from shared.wire.trajectory import Failure
from shared.wire.weights import Control

_TICK_S = 1.0
_STREAMS_LOOK_S = 5.0
_FOREIGN_RETRY_S = 5.0
_POLL_S = 0.02


async def serve(context: Context, config: LearnerConfig) -> None:
    """Train the run to its last version, or until the context is stopped.

    Raises:
        ConfigError: model directory or task source cannot be used.
        Fenced: another learner took over.
        Fatal: the run cannot go on, or a rank of this learner was lost.
    """
    ranks = await asyncio.to_thread(meet_ranks, config)
    try:
        work = _serve_on(context, config, ranks)
        await unless_lost(ranks, work, "starting again from the last checkpoint")
    finally:
        ranks.close()


async def _serve_on(context: Context, config: LearnerConfig, ranks: Ranks) -> None:
    backend = await asyncio.to_thread(load_backend, config, ranks)
    make_scorer = partial(load_backend, config, ranks, trains=False)
    source = load_task_source(config)
    await context.bus.create_streams()
    shell = _Shell(context, config, backend, source, make_scorer)
    await shell.run()


class _Shell:
    def __init__(
        self,
        context: Context,
        config: LearnerConfig,
        backend: Backend,
        source: TaskSource,
        make_scorer: Callable[[], Backend],
    ) -> None:
        self._context = context
        self._config = config
        self._bus = context.bus
        self._source = source
        self._positions = Positions(context.bus)
        self._inputs = make_inputs(context, config, backend, self._positions, make_scorer)
        self._route = self._inputs.route
        self._board = LeaseBoard(context.bus, config.telemetry.lease_expiry_s)
        self._journal = JournalLog(context.bus)
        self._publisher = make_publisher(
            config.weights,
            context.bus,
            context.log,
            model_id=config.model.model_id,
            producer=context.pod,
        )
        self._experts = replayed(backend, config.model.routing)
        self._desk = Desk(
            context,
            config,
            self._journal,
            source,
            needs_scores=self._route.waits_for_scores,
            objection=partial(objection, num_vocab=backend.vocab_size, experts=self._experts),
        )
        self._fencing = self._make_fencing(backend) if self._route.needs_fence else None
        self._keyframing = Keyframing(
            context,
            self._publisher,
            self._board,
            own_wants=lambda: self._route.keyframe_wanted,
        )
        self._purging = Purging(context, self._publisher, archive=config.run.archive)
        self._learner = Learner(
            context,
            config,
            backend,
            self._desk,
            self._journal,
            Publication(
                context,
                backend,
                self._publisher,
                self._board,
                Slack(config.admission.sync_slack, config.learner.sync_wait_s),
                vocab_size=backend.vocab_size,
                context_tokens=config.sampling.context_tokens,
            ),
            self._inputs,
            self._positions,
            self._fencing,
        )
        self._phase: Literal["running", "draining", "done"] = "running"
        self._pauses = Pauses()
        context.measured |= bounds(config)
        self._waited_s: dict[str, float] = {}
        """Seconds an unscored trajectory has waited while an oracle was there."""

    def _make_fencing(self, backend: Backend) -> Fencing:
        config, section = self._config, self._config.old_logprobs
        return Fencing(
            self._context,
            self._desk,
            self._positions,
            self._board,
            Completer(
                backend,
                num_vocab=backend.vocab_size,
                layout=section.layout,
                temperature=config.sampling.temperature,
                pack_tokens=config.learner.optimizer.micro_batch_tokens,
                experts=self._experts,
            ),
            self._put_control,
            timeout_s=section.fence_timeout_s,
            # every env agent that lives has renewed its lease by then
            deaf_s=2 * config.telemetry.lease_interval_s,
        )

    async def run(self) -> None:
        await self._board.start()
        try:
            await self._run()
        finally:
            self._learner.close()
            await self._inputs.close()

    async def _run(self) -> None:
        await self._learner.take_over()
        if self._journal.state.cursor:
            self._source.restore(self._journal.state.cursor)
        await self._put_control()
        self._context.health.set_ready()
        async with asyncio.TaskGroup() as group:
            loops = [
                group.create_task(loop)
                for loop in (
                    self._read_terminals(),
                    *([self._read_scores()] if self._reads_scores else []),
                    self._issue(),
                    self._evaluate_progress(),
                    self._tick(),
                    self._keyframing.run(),
                )
            ]
            await self._learner.train()
            await self._learner.evaluator.finish_rounds()
            for loop in loops:
                loop.cancel()
        await self._learner.finish()
        self._phase = "done" if self._learner.finished else "draining"
        await self._put_control()
        if self._phase == "done" and self._config.learner.at_end == "wait":
            self._context.log.info("done_waiting")
            await self._context.stop.wait()

    # --- arrivals
    @property
    def _reads_scores(self) -> bool:
        """Whether others store them; those of a fence are on the desk when they are stored."""
        if self._inputs.shadows.reads_scores:
            return True
        return self._route.waits_for_scores and self._fencing is None

    async def _read_terminals(self) -> None:
        async with aclosing(self._bus.read("terminals", self._positions.next["terminals"])) as log:
            async for records in log:
                for record in records:
                    await self._take_terminal(record)
                    self._positions.next["terminals"] = record.seq + 1

    async def _read_scores(self) -> None:
        async with aclosing(self._bus.read("scores", self._positions.next["scores"])) as log:
            async for records in log:
                for record in records:
                    await self._take_score(record)
                    self._positions.next["scores"] = record.seq + 1

    async def _take_terminal(self, record: Record) -> None:
        while True:
            try:
                with self._context.busy():
                    event = terminal_event(record)
                    if isinstance(event.outcome, Failure):
                        self._context.count(f"failed_{event.outcome.reason}")
                    self._desk.terminal(event)
                return
            except ForeignMajor as error:
                await self._wait_for_upgrade(error)

    async def _take_score(self, record: Record) -> None:
        while True:
            try:
                message = await accept(
                    self._context, record.subject, record.seq, record.payload, Score
                )
            except ForeignMajor as error:
                await self._wait_for_upgrade(error)
                continue
            with self._context.busy():
                if not self._route.waits_for_scores:
                    if message is not None:
                        self._inputs.shadows.take_score(score_event(message, record.seq))
                elif message is None:
                    self._desk.score_lost(record.subject.rpartition(".")[2], "unreadable")
                else:
                    self._desk.score(score_event(message, record.seq))
            return

    async def _wait_for_upgrade(self, error: ForeignMajor) -> None:
        """A log cannot be handed back: stand still, unready, until this process is upgraded."""
        self._context.health.set_unready(str(error))
        await asyncio.sleep(_FOREIGN_RETRY_S)

    # --- clocks
    async def _issue(self) -> None:
        while not self._context.stop.is_set():
            await self._desk.dispose_failed()
            if await self._desk.issue() == 0:
                await asyncio.sleep(_POLL_S)

    async def _evaluate_progress(self) -> None:
        while not self._config.learner.eval.pin:
            evaluator, head = self._learner.evaluator, self._learner.version
            due = evaluator.due_progress(head)
            if due is not None:
                await evaluator.evaluate("progress", due, head=head)
            await asyncio.sleep(0.2)

    async def _tick(self) -> None:
        last, next_look = time.time(), 0.0
        while True:
            await asyncio.sleep(_TICK_S)
            now = time.time()
            # A call that waited out an outage shows as a late tick, not as a lost connection.
            if not self._bus.connected or now - last > 3 * _TICK_S:
                self._pauses.add(now, now - last)
            else:
                self._give_up_scores(now - last)
            last = now
            await self._fail_overdue(now)
            await self._put_control()
            await self._purging.purge(self._low_water_mark(), self._learner.floors)
            self._inputs.shadows.forget(self._journal.state.open_tickets)
            self._gauges()
            if now >= next_look:
                next_look = now + _STREAMS_LOOK_S
                await self._measure_streams()

    def _give_up_scores(self, elapsed_s: float) -> None:
        """Count how long trajectories wait for scores while an oracle lives, up to the bound."""
        if not self._board.live("logit_oracle"):
            return
        unscored = self._desk.staging.unscored_tickets
        self._waited_s = {t: self._waited_s.get(t, 0.0) + elapsed_s for t in unscored}
        bound_s = self._config.old_logprobs.score_timeout_s
        for ticket_id, waited_s in self._waited_s.items():
            if waited_s > bound_s:
                self._desk.score_lost(ticket_id, f"no score for {waited_s:.0f} s")

    async def _fail_overdue(self, now: float) -> None:
        unsettled = set(self._desk.staging.unsettled_tickets)
        for round_ in self._desk.rounds.values():
            unsettled |= round_.tickets.keys() - round_.outcomes.keys()
        waiting = [t for t in self._journal.state.open_tickets.values() if t.ticket_id in unsettled]
        training = [t for t in waiting if t.purpose == "train"]
        evaluating = [t for t in waiting if t.purpose == "eval"]
        lifetimes = (self._config.admission.ticket_deadline_s, self._config.learner.eval.deadline_s)
        for ticket in (
            *overdue(training, now, self._pauses, lifetime_s=lifetimes[0]),
            *overdue(evaluating, now, self._pauses, lifetime_s=lifetimes[1]),
        ):
            terminal = deadline_terminal(ticket, self._context.pod, uuid.uuid4().hex)
            subject = self._bus.subjects.terminal(ticket.ticket_id)
            try:
                await self._bus.append(subject, encode(terminal), expect_last_subject_seq=0)
            except Conflict:
                continue  # an env was faster: its terminal counts, and is about to be read
            self._context.count("deadline_terminals")

    def _low_water_mark(self) -> int:
        return oldest_needed(
            self._learner.version,
            issue_versions=self._desk.admission.outstanding.values(),
            checkpoint_versions=self._replayed_versions(),
        )

    def _replayed_versions(self) -> list[int]:
        """Return the oldest versions that a restart from each checkpoint may have to score."""
        needed = self._inputs.shadows.needs_history or not self._route.waits_for_scores
        back = self._config.admission.max_staleness if needed else 0
        return [max(0, version - back) for version in self._learner.retained_versions]

    async def _put_control(self) -> None:
        control = Control(
            phase=self._phase,
            head_version=self._learner.version,
            oldest_needed=self._low_water_mark(),
            generation=self._fencing.generation if self._fencing else 0,
            min_version=self._fencing.min_version if self._fencing else 0,
            updated_at=time.time(),
        )
        await self._bus.put_control("control", encode(control))
        if self._fencing is not None:
            await self._bus.publish(self._bus.subjects.control, encode(control))

    def _gauges(self) -> None:
        self._context.gauges |= {
            "outstanding_groups": float(len(self._desk.admission.outstanding)),
            "ready_groups": float(len(self._desk.ready)),
            "unscored_trajectories": float(len(self._desk.staging.unscored_tickets)),
        }

    async def _measure_streams(self) -> None:
        """What the streams hold, for Prometheus: a full one is a fault somebody must see coming."""
        labelled = self._context.labelled
        try:
            states = {spec.name: await self._bus.stream_state(spec.name) for spec in STREAMS}
        except BusError as error:
            self._context.log.debug("streams_unmeasured", reason=str(error))
            return
        labelled["stream_bytes", "stream"] = {n: float(s.num_bytes) for n, s in states.items()}
        labelled["stream_messages", "stream"] = {
            n: float(s.num_messages) for n, s in states.items()
        }
