"""The learner's side of the fence, performed: announce, wait, read, score, store.

Consumes leases and the `partials` stream; waits for every live env agent, at most
`old_logprobs.fence_timeout_s`; unblocked by acknowledgements; produces the control document's
generation, scores of partials, and for every trajectory played so far the same `Score` that an
oracle would store. All of it lies on the bus before the batch is journalled: a restarted learner
finds the numbers there and has not to go back to the weights they came from.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import torch

from services.learner.completing import Completed, Completer, Completion
from services.learner.desk import Desk
from services.learner.fence import Action, EnvAgent, Fence, Fenced, Lower, Raise, Resume, Seen
from services.learner.partials_log import PartialLog
from services.learner.positions import Positions
from services.learner.score_records import score_event
from shared.runtime.context import Context
from shared.runtime.errors import Conflict
from shared.runtime.leases import LeaseBoard
from shared.wire.codec import decode, encode
from shared.wire.fencing import FENCE_GENERATION, FENCE_INTERRUPTED
from shared.wire.messages import Layout, Score
from shared.wire.weights import Control

_POLL_S = 0.01
_WINDOW = 32
"""Appends in flight."""


@dataclass(frozen=True, slots=True)
class FenceReport:
    """What one fence cost and found."""

    fence_s: float
    """From the announcement until everything is handed in: env agents do not sample meanwhile."""
    score_s: float
    """Forwards and stores after that."""
    fenced: Fenced
    completion: Completion

    def scalars(self) -> dict[str, float]:
        """Figures of the step report; its old log-probs cost the whole fence."""
        return {
            "old_logprobs_s": self.fence_s + self.score_s,
            "old_logprobs_forward_tokens": float(self.completion.forward_tokens),
            "fence_s": self.fence_s,
            "fence_score_s": self.score_s,
            "fence_acknowledged": float(len(self.fenced.acknowledged)),
            "fence_excluded": float(len(self.fenced.excluded)),
            "fence_silent": float(len(self.fenced.silent)),
            "interrupted_turns": float(self.fenced.interrupted),
            "fence_scored_tokens": float(self.completion.scored_tokens),
            "fence_partial_tokens": float(self.completion.partial_tokens),
            "fence_unscorable_tokens": float(self.completion.unscorable_tokens),
        }


class Fencing:
    """One learner process's fences.

    Args:
        context: bus, counters and log.
        desk: what was played and waits for its score.
        positions: how far the terminals have been read.
        board: who lives; listens from about now on.
        completer: scores under the weights being trained.
        put_control: writes the control document, with `generation` and `min_version` from here.
        timeout_s: longest wait for env agents.
        deaf_s: so long from now on an env agent may live without having been heard.
    """

    def __init__(
        self,
        context: Context,
        desk: Desk,
        positions: Positions,
        board: LeaseBoard,
        completer: Completer,
        put_control: Callable[[], Awaitable[None]],
        *,
        timeout_s: float,
        deaf_s: float,
    ) -> None:
        self._context = context
        self._bus = context.bus
        self._desk = desk
        self._positions = positions
        self._board = board
        self._completer = completer
        self._put_control = put_control
        self._partials = PartialLog(context)
        self._looked_at = time.monotonic()
        self._lost_s = 0.0
        """Seconds the bus was away."""
        self._fence = Fence(timeout_s=timeout_s, deaf_until=self._now() + deaf_s)
        self._timeout_s = timeout_s

    @property
    def generation(self) -> int:
        return self._fence.generation

    @property
    def min_version(self) -> int:
        return self._fence.min_version

    async def resume(self, version: int) -> None:
        """Take over what an earlier process announced, and what was handed in and scored.

        Raises:
            WireError: the control document is of another major version.
        """
        stored = await self._bus.get_control("control")
        control = None if stored is None else decode(stored, Control)
        generation = control.generation if control else 0
        min_version = control.min_version if control else 0
        await self._partials.read(None)
        await self._perform(Resume(version, generation, min_version))

    async def run(self, version: int, digest: str) -> FenceReport | None:
        """Score everything that was sampled by `version`; None when the context is stopped.

        Afterwards every trajectory played so far is on the desk with its score.
        """
        started = time.perf_counter()
        await self._perform(Raise(version))
        fenced = await self._acknowledged()
        if fenced is None:
            return None
        await self._partials.read(version)
        await self._read_terminals()
        handed_in = time.perf_counter()
        with self._context.busy():
            completion = await asyncio.to_thread(
                self._completer.complete,
                self._desk.staging.unscored,
                self._partials.book.partials,
                self._partials.book,
                version=version,
                digest=digest,
            )
        await self._partials.append(
            completion.partials, version=version, digest=digest, layout=self._layout()
        )
        await self._store_scores(completion)
        staging = self._desk.staging
        open_tickets = {*staging.unsettled_tickets, *staging.unscored_tickets}
        await self._partials.forget(open_tickets, version)
        report = FenceReport(
            handed_in - started, time.perf_counter() - handed_in, fenced, completion
        )
        self._note(report, version)
        return report

    async def lower(self, version: int) -> None:
        """Let `version` be sampled again: no step leaves it now."""
        self._context.count("fences_lowered")
        await self._perform(Lower(version))

    async def published(self) -> None:
        """Tell the env agents about a new head at once: their requests wait for it."""
        await self._put_control()

    # --- the fence
    async def _perform(self, event: Raise | Lower | Resume) -> None:
        if self._fence.handle(event, self._now()):
            await self._put_control()

    async def _acknowledged(self) -> Fenced | None:
        while not self._context.stop.is_set():
            actions: list[Action] = self._fence.handle(Seen(self._env_agents()), self._now())
            for action in actions:
                if isinstance(action, Fenced):
                    return action
            await asyncio.sleep(_POLL_S)
        return None

    def _env_agents(self) -> list[EnvAgent]:
        return [
            EnvAgent(
                lease.pod,
                lease.incarnation,
                int(lease.gauges.get(FENCE_GENERATION, -1)),
                int(lease.gauges.get(FENCE_INTERRUPTED, 0)),
            )
            for lease in self._board.live("env_agents")
        ]

    def _now(self) -> float:
        """A clock that stands still while the bus is away."""
        now = time.monotonic()
        if not self._bus.connected:
            self._lost_s += now - self._looked_at
        self._looked_at = now
        return now - self._lost_s

    # --- what was handed in
    async def _read_terminals(self) -> None:
        """Wait until the loop that reads terminals has seen those stored before the fence."""
        last = (await self._bus.stream_state("terminals")).last_seq
        deadline = self._now() + self._timeout_s
        while self._positions.next["terminals"] <= last and not self._context.stop.is_set():
            if self._now() > deadline:
                self._context.log.warning("terminals_unread", last_seq=last)
                return
            await asyncio.sleep(_POLL_S)

    # --- what was scored
    async def _store_scores(self, completion: Completion) -> None:
        window = asyncio.Semaphore(_WINDOW)
        async with asyncio.TaskGroup() as group:
            stores = [group.create_task(self._store(one, window)) for one in completion.terminals]
        for store in stores:
            score, seq = store.result()
            self._desk.score(score_event(score, seq))
            following = max(self._positions.next["scores"], seq + 1)
            self._positions.next["scores"] = following

    async def _store(self, one: Completed, window: asyncio.Semaphore) -> tuple[Score, int]:
        score = Score(
            ticket_id=one.event.ticket_id,
            terminal_seq=one.event.seq,
            terminal_digest=one.event.digest,
            sequences=one.score.sequences(),
            layout=self._layout(),
            producer=self._context.pod,
            forward_tokens=one.score.forward_tokens,
            compute_s=one.score.compute_s,
        )
        subject = self._bus.subjects.score(score.ticket_id)
        async with window:
            try:
                return score, await self._bus.append(
                    subject, encode(score), expect_last_subject_seq=0
                )
            except Conflict:
                # An earlier process stored it and died before it could use it.
                stored = await self._bus.last(subject)
                if stored is None:
                    raise
                self._context.count("adopted_scores")
                return decode(stored.payload, Score), stored.seq

    def _layout(self) -> Layout:
        completer = self._completer
        return Layout(
            backend=completer.backend.name,
            dtype=str(completer.backend.dtype).removeprefix("torch."),
            kind=completer.layout,
            num_threads=torch.get_num_threads(),
        )

    def _note(self, report: FenceReport, version: int) -> None:
        scalars, fenced = report.scalars(), report.fenced
        self._context.count("fences")
        for name in (
            "old_logprobs_s", "fence_s", "fence_score_s", "fence_excluded", "fence_silent",
            "interrupted_turns",
            "fence_scored_tokens", "fence_partial_tokens", "fence_unscorable_tokens",
        ):  # fmt: skip
            self._context.count(name, scalars[name])
        if fenced.excluded or fenced.silent or report.completion.unscorable_tokens:
            self._context.log.warning(
                "fence_incomplete",
                version=version,
                excluded=fenced.excluded,
                silent=fenced.silent,
                unscorable_tokens=report.completion.unscorable_tokens,
            )
