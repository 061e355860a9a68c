"""The shell: tickets in, one terminal per ticket out.

Pull: consumes tickets; waits for a free place; unblocked by a finished episode; produces episodes.
Episode: consumes one ticket; waits for environment and rollouts, at most to the ticket's deadline;
produces its terminal, then acknowledges. Keeper: tells the bus that tickets are in play.
"""

from __future__ import annotations

import asyncio
import random
import time
import traceback
import uuid
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

from services.env_agents import loading
from services.env_agents.attempts import Attempt, terminal_of
from services.env_agents.config import EnvAgentsConfig
from services.env_agents.episodes import Episode, Limits
from services.env_agents.fencing import Fencing
from services.env_agents.gate import Gate
from services.env_agents.hosting import MakeEnvironment, hosted
from services.env_agents.player import Player
from services.env_agents.sampler_client import SamplerClient
from shared.runtime.bus import Job, WorkQueue
from shared.runtime.context import Context
from shared.runtime.errors import BusUnavailable, Conflict, PayloadTooLarge, RuntimeFault
from shared.runtime.intake import accept
from shared.wire.codec import encode
from shared.wire.errors import ForeignMajor
from shared.wire.fencing import PartialTrajectory
from shared.wire.messages import Ticket
from shared.wire.trajectory import Failure, Outcome

QUEUE = "env_agents"
"""Durable name of the work queue's consumer."""

FOREIGN_DELAY_S = 5.0
"""A ticket of another wire major waits so long for somebody who can read it."""


async def serve(context: Context, config: EnvAgentsConfig) -> None:
    """Play tickets until the context is stopped.

    Raises:
        ConfigError: the environment or the renderer cannot be used.
        BusUnavailable: the bus did not answer within its bounds.
    """
    async with hosted(context, config) as make_environment:
        await _serve(context, config, make_environment)


async def _serve(context: Context, config: EnvAgentsConfig, make: MakeEnvironment) -> None:
    section = config.env_agents
    renderer = loading.renderer(
        config.task.renderer, config.model.source, config.task.renderer_options
    )
    if not await context.streams_exist(section.streams_timeout_s):
        return
    queue = await context.bus.work_queue(
        "tickets", QUEUE, ack_wait_s=section.ack_wait_s, max_ack_pending=section.max_ack_pending
    )
    silence_s = section.heartbeat_s * section.heartbeat_misses
    gate = Gate() if config.old_logprobs.route == "interrupt" else None
    sampler = SamplerClient(context, silence_s=silence_s, gate=gate)
    fencing = Fencing(context, gate, sampler, bound_s=silence_s) if gate else None
    player = Player(context, make, renderer, sampler, section.env_timeout_s)
    agents = _EnvAgents(context, config, player, renderer.stop_ids)
    if fencing is not None:
        await fencing.start()
    context.health.set_ready()
    context.log.info("serving", environment=config.task.environment, places=section.concurrency)
    try:
        await agents.run(queue, fencing)
    finally:
        if fencing is not None:
            await fencing.close()
        await sampler.close()
        await queue.close()
        context.log.info("stopped", **context.counters)


@dataclass(eq=False)
class _Place:
    """A ticket in play."""

    job: Job
    task: asyncio.Task[None] | None = None
    storing: bool = False
    """Its outcome is known and on its way to the log: too late to hand the ticket back."""
    attempt: Attempt | None = None


class _EnvAgents:
    def __init__(
        self,
        context: Context,
        config: EnvAgentsConfig,
        player: Player,
        stop_ids: tuple[int, ...],
    ) -> None:
        self._context = context
        self._section = config.env_agents
        self._player = player
        self._stop_ids = stop_ids
        self._limits = Limits(
            max_turns=config.task.max_turns,
            context_tokens=config.sampling.context_tokens,
            backoff_s=self._section.backoff_s,
            backoff_max_s=self._section.backoff_max_s,
        )
        self._places: set[_Place] = set()
        self._place_freed = asyncio.Event()
        self._foreign = ""
        """Why we went unready: the last ticket of another wire major."""
        self._jitter = random.Random(context.incarnation).random

    async def run(self, queue: WorkQueue, fencing: Fencing | None) -> None:
        async with asyncio.TaskGroup() as group:
            around = [group.create_task(self._keep())]
            if fencing is not None:
                around.append(group.create_task(fencing.run(self._partials)))
            try:
                await self._pull(queue, group)
                await self._drain()
            finally:
                for task in around:
                    task.cancel()

    async def _pull(self, queue: WorkQueue, group: asyncio.TaskGroup) -> None:
        stop = self._context.stop
        while not stop.is_set():
            free = self._section.concurrency - len(self._places)
            if free <= 0:
                await _bounded(self._wait_for_place(), self._section.pull_timeout_s)
                continue
            jobs = await queue.next(free, self._section.pull_timeout_s)
            for job in jobs:
                place = _Place(job)
                self._places.add(place)
                place.task = group.create_task(self._occupy(place))
            if jobs:
                await asyncio.sleep(self._section.pull_linger_s)

    async def _wait_for_place(self) -> None:
        self._place_freed.clear()
        await self._place_freed.wait()

    async def _keep(self) -> None:
        """Every so often: gauges, busy time, and word to the bus about the tickets in play."""
        self._context.measured["places"] = float(self._section.concurrency)
        started_s = time.thread_time() - self._context.busy_s
        interval_s = min(0.5, self._section.ack_wait_s / 6)
        next_word = time.monotonic() + self._section.ack_wait_s / 3
        while True:
            await asyncio.sleep(interval_s)
            # CPU time of the loop's thread: what this process itself did, waiting excluded.
            self._context.busy_s = time.thread_time() - started_s
            self._context.gauges["episodes_running"] = float(len(self._places))
            if time.monotonic() >= next_word:
                next_word += self._section.ack_wait_s / 3
                await self._say_in_progress()

    async def _say_in_progress(self) -> None:
        try:
            for place in list(self._places):
                if place in self._places:
                    await place.job.in_progress()
        except BusUnavailable as error:
            # At worst a ticket is played twice; the terminal's fence keeps one outcome.
            self._context.log.warning("in_progress_unsent", reason=str(error))

    async def _drain(self) -> None:
        """Let outcomes be stored, hand every other ticket to another env agent."""
        for place in self._places:
            if place.task is not None and not place.storing:
                place.task.cancel()
        tasks = [place.task for place in self._places if place.task is not None]
        if tasks:
            await asyncio.wait(tasks, timeout=self._section.drain_s)
        for place in self._places:
            if place.task is not None:
                place.task.cancel()
        self._context.gauges["episodes_running"] = 0.0

    # --- one ticket
    async def _occupy(self, place: _Place) -> None:
        try:
            await self._work(place)
        except asyncio.CancelledError:
            self._context.count("abandoned_episodes")
            await self._hand_back(place.job)
            raise
        except RuntimeFault:
            raise
        except Exception as error:  # noqa: BLE001 - one ticket must not end the other episodes
            # Delivered again, and after max_attempts it ends as a failed episode.
            self._context.count("internal_errors")
            self._context.log.error(
                "episode_crashed",
                seq=place.job.record.seq,
                error=repr(error),
                traceback=traceback.format_exc(),
            )
            await self._hand_back(place.job, delay_s=1.0)
        finally:
            self._places.discard(place)
            self._place_freed.set()

    async def _work(self, place: _Place) -> None:
        job = place.job
        record = job.record
        try:
            ticket = await accept(self._context, record.subject, record.seq, record.payload, Ticket)
        except ForeignMajor as error:
            self._foreign = str(error)
            await self._hand_back(job, FOREIGN_DELAY_S)
            return
        if ticket is None:
            await job.term()
            return
        if self._foreign and self._context.health.reason == self._foreign:
            self._context.health.set_ready()
        if job.num_delivered > 1 and await self._is_stored(ticket):
            await self._ack(job)
            return
        attempt_id = f"{self._context.pod}-{uuid.uuid4().hex[:12]}"
        outcome = await self._outcome(place, ticket, attempt_id)
        place.storing = True
        await self._store(ticket, attempt_id, outcome)
        await self._ack(job)

    def _partials(self, generation: int, floor: int) -> list[PartialTrajectory]:
        """Return what was sampled below the floor and is on no terminal or partial yet."""
        attempts = filter(None, (place.attempt for place in self._places))
        partials = [attempt.partial(self._context, generation, floor) for attempt in attempts]
        return [partial for partial in partials if partial is not None]

    async def _outcome(self, place: _Place, ticket: Ticket, attempt_id: str) -> Outcome:
        job = place.job
        if job.num_delivered > self._section.max_attempts:
            return Failure(
                reason="max_deliver",
                detail=f"delivered {job.num_delivered} times, max_attempts is "
                f"{self._section.max_attempts}",
            )
        episode = Episode(ticket, attempt_id, self._limits, self._stop_ids, self._jitter)
        place.attempt = Attempt(ticket, attempt_id, episode)
        return await self._player.play(ticket, episode)

    async def _store(self, ticket: Ticket, attempt_id: str, outcome: Outcome) -> None:
        """Append the terminal, or adopt the one that is already there."""
        try:
            await self._append(ticket, attempt_id, outcome)
        except Conflict:
            self._context.count("adopted_terminals")
            return
        except PayloadTooLarge as error:
            outcome = Failure(reason="too_long", detail=str(error))
            await self._store(ticket, attempt_id, outcome)
            return
        self._context.count("episodes")
        if isinstance(outcome, Failure):
            self._context.count("failed_episodes")
            self._context.log.warning(
                "episode_failed",
                ticket_id=ticket.ticket_id,
                reason=outcome.reason,
                detail=outcome.detail,
            )

    async def _append(self, ticket: Ticket, attempt_id: str, outcome: Outcome) -> None:
        terminal = terminal_of(ticket, attempt_id, self._context.pod, outcome)
        subject = self._context.bus.subjects.terminal(ticket.ticket_id)
        await self._context.bus.append(
            subject, encode(terminal), expect_last_subject_seq=0, msg_id=attempt_id
        )

    async def _is_stored(self, ticket: Ticket) -> bool:
        subject = self._context.bus.subjects.terminal(ticket.ticket_id)
        return await self._context.bus.last(subject) is not None

    async def _hand_back(self, job: Job, delay_s: float = 0.0) -> None:
        try:
            await _bounded(job.nak(delay_s), self._section.drain_s)
        except BusUnavailable as error:
            # The redelivery timer hands the ticket on instead.
            self._context.log.warning("nak_unsent", seq=job.record.seq, reason=str(error))

    async def _ack(self, job: Job) -> None:
        try:
            await job.ack()
        except BusUnavailable as error:
            # The outcome is stored: the redelivery will find it and only acknowledge.
            self._context.log.warning("ack_unconfirmed", seq=job.record.seq, reason=str(error))


async def _bounded(call: Coroutine[Any, Any, None], bound_s: float) -> None:
    try:
        async with asyncio.timeout(bound_s):
            await call
    except TimeoutError:
        return
