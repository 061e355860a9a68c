"""One oracle process: performs what the elevator orders."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

from services.logit_oracle.bench import Bench
from services.logit_oracle.config import LogitOracleConfig
from services.logit_oracle.elevator import Elevator
from services.logit_oracle.orders import (
    Action,
    Arrived,
    Ask,
    Drain,
    Event,
    Evict,
    Floor,
    Move,
    Moved,
    MoveFailed,
    Scored,
    ScorePack,
    Store,
    Tick,
    Unscorable,
    parts_of,
)
from services.logit_oracle.storing import store_score
from services.logit_oracle.versions import Versions
from shared.backends.expert_layers import ExpertLayers
from shared.backends.objection import objection
from shared.backends.trajectory_scoring import TrajectoryScore, pieces_of
from shared.runtime.bus import Job, WorkQueue
from shared.runtime.context import Context
from shared.runtime.intake import FOREIGN_DELAY_S, accept
from shared.weights.errors import MissingVersion
from shared.weights.follower import Follower
from shared.weights.history import WeightHistory
from shared.wire.codec import content_digest, decode
from shared.wire.errors import ForeignMajor, WireError
from shared.wire.messages import Score, Terminal
from shared.wire.trajectory import Trajectory
from shared.wire.weights import Control

COUNTERS = (
    "trajectories", "scored_tokens", "unverified_tokens", "unscorable_tokens", "forward_tokens",
    "moves", "canary_checks", "canary_failures", "resyncs", "score_conflicts",
)  # fmt: skip


@dataclass(eq=False, slots=True)
class _Open:
    """A trajectory taken from the queue and not acknowledged."""

    job: Job
    ticket_id: str
    score: TrajectoryScore
    renew_at: float


class Oracle:
    """Feeds the elevator from the bus and carries out its orders, all on one event loop."""

    def __init__(
        self,
        context: Context,
        config: LogitOracleConfig,
        *,
        bench: Bench,
        history: WeightHistory,
        follower: Follower,
        num_vocab: int,
        experts: ExpertLayers | None = None,
    ) -> None:
        section = config.logit_oracle
        self._context = context
        self._section = section
        self._model_id = config.model.model_id
        self._temperature = config.sampling.temperature
        self._bench = bench
        self._history = history
        self._follower = follower
        self._versions = Versions(context, section, history, follower, self._tell)
        self._num_vocab = num_vocab
        self._experts = experts
        self._elevator = Elevator(
            pack_tokens=section.pack_tokens,
            max_wait_s=section.max_wait_s,
            canary_retries=section.canary_retries,
            ask_retry_s=section.ask_retry_s,
            absent_after_s=section.absent_after_s,
        )
        self._open: dict[int, _Open] = {}
        self._num_taken = 0
        self._freed = asyncio.Event()
        self._orders: asyncio.Queue[Move | ScorePack] = asyncio.Queue()
        self._settled: asyncio.Queue[int | Job] = asyncio.Queue()
        self._due_changed = asyncio.Event()
        self._due_at: float | None = None
        self._group = asyncio.TaskGroup()
        self._tasks: set[asyncio.Task[None]] = set()
        self._bench_busy_s = 0.0
        self._foreign = (0.0, "")
        """Until when an unreadable newer peer makes us unready, and why."""
        for name in COUNTERS:
            context.count(name, 0)

    async def run(self, queue: WorkQueue) -> None:
        """Serve until the context is stopped, then finish or hand back what is held."""
        self._context.health.set_unready("no policy version yet")
        async with self._group:
            self._spawn(self._versions.follow())
            self._spawn(self._forward())
            self._spawn(self._watch_time())
            self._spawn(self._watch_control())
            self._spawn(self._renew())
            for _ in range(self._section.store_concurrency):
                self._spawn(self._store())
            try:
                await self._pull(queue)
                await self._drain()
            finally:
                for task in self._tasks:
                    task.cancel()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._group.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # --- the elevator
    def _tell(self, event: Event) -> None:
        for action in self._elevator.handle(event, time.monotonic()):
            self._perform(action)
        due_at = self._elevator.due_at()
        if due_at != self._due_at:
            self._due_at = due_at
            self._due_changed.set()

    def _perform(self, action: Action) -> None:
        match action:
            case Move() | ScorePack():
                self._orders.put_nowait(action)
            case Store(job):
                self._settled.put_nowait(job)
            case Ask():
                self._spawn(self._versions.ask(action))
            case Unscorable(version, parts):
                lost = sum(self._open[part.job].score.give_up(part.index) for part in parts)
                self._context.count("unscorable_tokens", lost)
                self._context.log.warning("unscorable", version=version, tokens=lost)
            case Evict(below):
                self._history.evict_below(below)

    async def _watch_time(self) -> None:
        while True:
            self._due_changed.clear()
            wait_s = None if self._due_at is None else max(0.0, self._due_at - time.monotonic())
            try:
                async with asyncio.timeout(wait_s):
                    await self._due_changed.wait()
            except TimeoutError:
                self._tell(Tick())

    # --- terminals in
    async def _pull(self, queue: WorkQueue) -> None:
        section = self._section
        while not self._context.stop.is_set():
            free = section.max_in_flight - len(self._open)
            if free <= 0:
                await self._wait_for_place(section.fetch_timeout_s)
                continue
            jobs = await queue.next(min(free, section.fetch_batch), section.fetch_timeout_s)
            for job in jobs:
                with self._context.busy():
                    await self._take(job)
            if jobs:
                await asyncio.sleep(section.fetch_linger_s)

    async def _wait_for_place(self, timeout_s: float) -> None:
        self._freed.clear()
        try:
            async with asyncio.timeout(timeout_s):
                await self._freed.wait()
        except TimeoutError:
            return

    async def _take(self, job: Job) -> None:
        record = job.record
        try:
            terminal = await accept(
                self._context, record.subject, record.seq, record.payload, Terminal
            )
        except ForeignMajor as error:
            self._foreign = (time.monotonic() + 2 * FOREIGN_DELAY_S, str(error))
            await job.nak(FOREIGN_DELAY_S)
            return
        if terminal is None:
            await job.term()
            return
        outcome = terminal.outcome
        if terminal.purpose != "train" or not isinstance(outcome, Trajectory):
            self._settled.put_nowait(job)
            return
        self._num_taken += 1
        number = self._num_taken
        pieces = pieces_of(
            outcome,
            kind=self._section.layout,
            temperature=self._temperature,
            replays=self._experts is not None,
        )
        score = TrajectoryScore(outcome, pieces, self._bench.dtype)
        renew_at = time.monotonic() + self._section.ack_wait_s / 3
        self._open[number] = _Open(job, terminal.ticket_id, score, renew_at)
        problem = objection(outcome, self._num_vocab, self._experts)
        if problem:
            lost = sum(score.give_up(index) for index in range(len(pieces)))
            self._context.count("unscorable_tokens", lost)
            self._context.log.error("terminal_refused", ticket=terminal.ticket_id, reason=problem)
            self._tell(Arrived(number, ()))
        else:
            self._tell(Arrived(number, parts_of(number, pieces)))

    async def _renew(self) -> None:
        """Keep what is held from being delivered to another oracle."""
        period_s = self._section.ack_wait_s / 3
        while True:
            await asyncio.sleep(period_s / 4)
            now = time.monotonic()
            for held in list(self._open.values()):
                if now >= held.renew_at:
                    held.renew_at = now + period_s
                    await held.job.in_progress()

    # --- forwards
    async def _forward(self) -> None:
        while True:
            order = await self._orders.get()
            if isinstance(order, Move):
                await self._move(order.version)
            else:
                await self._score(order)
            self._context.busy_s += self._bench.busy_s - self._bench_busy_s
            self._bench_busy_s = self._bench.busy_s

    async def _move(self, version: int) -> None:
        self._context.count("moves")
        try:
            canary = await self._bench.move(version)
        except MissingVersion:
            self._tell(MoveFailed(version))
            return
        self._context.count("canary_checks")
        if not canary.ok:
            self._context.count("canary_failures")
            self._context.log.error("canary_disagrees", version=version, max_error=canary.max_error)
        self._tell(Moved(version, canary.ok))
        self._refresh_health()

    async def _score(self, order: ScorePack) -> None:
        pack = [(self._open[part.job].score, part) for part in order.parts]
        forwarded = await self._bench.score([score.pieces[part.index] for score, part in pack])
        with self._context.busy():
            num_tokens = sum(part.num_tokens for part in order.parts)
            for (score, part), logprobs in zip(pack, forwarded.values, strict=True):
                status = score.settle(
                    part.index,
                    logprobs,
                    verified=order.verified,
                    digest=self._bench.digest,
                    compute_s=forwarded.seconds * part.num_tokens / num_tokens,
                )
                name = "scored_tokens" if status == "exact" else "unverified_tokens"
                self._context.count(name, len(logprobs))
            self._context.count("forward_tokens", num_tokens)
            self._tell(Scored())

    # --- scores out
    async def _store(self) -> None:
        while True:
            settled = await self._settled.get()
            if not isinstance(settled, int):
                await settled.ack()
                continue
            held = self._open[settled]
            with self._context.busy():
                score = self._message(held)
            if await store_score(self._context.bus, score):
                self._context.count("trajectories")
            else:
                self._context.count("score_conflicts")
            await held.job.ack()
            del self._open[settled]
            self._freed.set()

    def _message(self, held: _Open) -> Score:
        record = held.job.record
        return Score(
            ticket_id=held.ticket_id,
            terminal_seq=record.seq,
            terminal_digest=content_digest(record.payload),
            model_id=self._model_id,
            sequences=held.score.sequences(),
            layout=self._bench.layout,
            producer=self._context.pod,
            forward_tokens=held.score.forward_tokens,
            compute_s=held.score.compute_s,
        )

    # --- state of the process
    async def _watch_control(self) -> None:
        context = self._context
        while True:
            payload = await context.bus.get_control("control")
            if payload is not None:
                try:
                    self._tell(Floor(decode(payload, Control).oldest_needed))
                except WireError as error:
                    context.log.error("control_unreadable", reason=str(error))
            self._refresh_health()
            context.counters["resyncs"] = self._follower.resyncs
            context.gauges["backlog"] = self._elevator.num_parts
            context.gauges["in_flight"] = len(self._open)
            context.gauges["held_versions"] = len(self._history.versions)
            context.counters["weight_faults"] = self._history.faults
            context.gauges["held_bytes"] = self._history.bytes_held
            context.gauges["spilled_bytes"] = self._history.bytes_spilled
            context.gauges["keyframe_wanted"] = float(self._follower.keyframe_wanted)
            await asyncio.sleep(self._section.control_poll_s)

    def _refresh_health(self) -> None:
        health = self._context.health
        if not self._elevator.homed:
            health.set_unready(
                "the canary of the newest version disagrees"
                if self._context.counters["canary_failures"]
                else "no policy version yet"
            )
        elif time.monotonic() < self._foreign[0]:
            health.set_unready(self._foreign[1])
        elif self._follower.refused:
            health.set_unready(next(iter(self._follower.refused.values())))
        elif not self._context.stop.is_set():
            health.set_ready()

    # --- the end
    async def _drain(self) -> None:
        self._context.health.set_unready("stopping")
        self._tell(Drain())
        deadline = time.monotonic() + self._section.drain_s
        while (self._open or not self._settled.empty()) and time.monotonic() < deadline:
            await self._wait_for_place(min(0.1, self._section.drain_s))
        for held in self._open.values():
            await held.job.nak()
