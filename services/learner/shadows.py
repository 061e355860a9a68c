"""Further routes beside the one trained on: asked about a share of every batch, never trusted.

Consumes journalled batches; waits for nothing but its own forwards, and at most
`old_logprobs.shadow_timeout_s` for a version or score; produces inputs of the comparison
(`shared/algo/shadow.py`) and the figures it leaves. Whatever fails here is counted and logged: the
step goes on without it. On replay the same trajectories are asked about, so that anchors which
follow what was measured are the same again.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from services.learner.items import ShadowInputs
from services.learner.routes.base import OldLogprobRoute, OldLogprobs, RouteCost
from services.learner.routes.carried import Nested
from services.learner.routes.forwards import Logprobs
from services.learner.routes.stored import StoredScores
from services.learner.staging import ScoreArrived, Scored
from services.learner.trainer import StepOutcome
from shared.algo.objective import Objective
from shared.algo.shadow import ShadowLosses, ShadowRoute, is_sampled
from shared.backends.base import Snapshot
from shared.runtime.context import Context
from shared.wire.journal import Batch
from shared.wire.messages import SequenceScore


def source_of(route: OldLogprobRoute) -> ShadowRoute:
    """Return where the comparison finds a route's numbers; most need not be asked for."""
    if route.proxy is not None or route.name == "rollout":
        return ShadowRoute(route.name, "sampler", route.proxy)
    if route.name == "current_recompute":
        return ShadowRoute(route.name, "current")
    return ShadowRoute(route.name, "given")


class Shadows:
    """The shadows of one learner process."""

    def __init__(
        self,
        context: Context,
        routes: Sequence[OldLogprobRoute],
        *,
        seed: int,
        share: float,
        every: int,
    ) -> None:
        """Let `routes` look on.

        Args:
            context: log and counters.
            routes: with backends of their own; not started.
            seed: of the run; with the ticket id it fixes who is looked at.
            share: of the trajectories.
            every: versions between comparisons.
        """
        self._context = context
        self._routes = {route.name: route for route in routes}
        self._seed, self._share, self._every = seed, share, every
        self._started: list[str] = []
        self._reasons: dict[str, str] = {}
        """Why a route failed last: each reason is logged once."""
        self._unanswered = dict.fromkeys(self._routes, 0.0)
        self._scalars: dict[str, float] = {}
        self._held: dict[str, int] = {}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._routes)

    @property
    def reads_scores(self) -> bool:
        """Whether stored scores are to be handed to `take_score`."""
        return isinstance(self._routes.get("oracle"), StoredScores)

    @property
    def needs_history(self) -> bool:
        """Whether past versions must stay on the bus as far as a replay may ask for them."""
        return "snapshot_old" in self._routes

    def losses(self, objective: Objective, trained: OldLogprobRoute) -> ShadowLosses | None:
        """Return what compares them; the first exact route is the reference."""
        if not self._routes:
            return None
        exact = [route.name for route in (trained, *self._routes.values()) if route.exact]
        return ShadowLosses(
            objective,
            [source_of(route) for route in self._routes.values()],
            trained=trained.name,
            trained_proxy=trained.proxy,
            reference=exact[0] if exact else None,
        )

    # --- life
    async def start(self) -> None:
        """Load their models; one that cannot be loaded is left out."""
        for name, route in self._routes.items():
            if await self._guarded(name, route.start()):
                self._started.append(name)

    async def close(self) -> None:
        for name in self._started:
            await self._guarded(name, self._routes[name].close())

    def snapshot(self) -> Snapshot:
        """Copy what `load` needs of a checkpoint, one folder each."""
        return Nested({f"shadow_{name}": self._routes[name].snapshot() for name in self._started})

    def load(self, folder: Path) -> None:
        """Take up what a checkpoint holds; a shadow that is new to the run starts afresh."""
        for name, route in self._routes.items():
            own = folder / f"shadow_{name}"
            try:
                if own.is_dir():
                    route.load(own)
            except Exception as error:  # noqa: BLE001 - a shadow never stops the run
                self._failed(name, error)

    def take_score(self, event: ScoreArrived) -> None:
        """Note a score that an oracle stored."""
        if isinstance(oracle := self._routes.get("oracle"), StoredScores):
            oracle.take(event)

    def forget(self, open_tickets: Collection[str]) -> None:
        """Drop scores of tickets that are no longer open."""
        if isinstance(oracle := self._routes.get("oracle"), StoredScores):
            oracle.forget(open_tickets)

    # --- steps
    async def ask(
        self, batch: Batch, members: Mapping[str, Scored], *, reported: bool
    ) -> ShadowInputs | None:
        """Move the shadows to the step from `batch.version`; what they say, None when not due.

        Args:
            batch: as journalled.
            members: its trajectories.
            reported: this step's report is on the log already: exact references are not asked.
        """
        self._scalars = {}
        if not self._started:
            return None
        started = time.perf_counter()
        due = batch.version % self._every == 0
        carrying = (m.ticket_id for g in batch.groups if not g.no_loss for m in g.members)
        compared = [t for t in carrying if is_sampled(t, seed=self._seed, share=self._share)]
        by_route: dict[str, Mapping[str, Logprobs]] = {}
        forwarded = 0
        for name in self._started:
            route = self._routes[name]
            # All that is trained, not only what is looked at: an anchor follows the ages of a step.
            await self._guarded(name, route.advance(list(members.values()), batch.version))
            told = source_of(route).source != "given"
            if told or not due or (reported and route.exact):
                continue
            old = await self._answer(route, [members[t] for t in compared], batch.version)
            by_route[name] = {
                t: _logprobs(s, members[t], exact=route.exact) for t, s in old.by_ticket.items()
            }
            forwarded += old.cost.forward_tokens
            self._held[name] = old.cost.held_bytes
            self._unanswered[name] += len(compared) - len(old.by_ticket)
            self._scalars.update({f"shadow_{name}_{k}": v for k, v in old.health.items()})
        self._scalars |= {
            "shadow_s": time.perf_counter() - started,
            "shadow_forward_tokens": float(forwarded),
            "shadow_held_bytes": float(sum(self._held.values())),
            **{f"shadow_{name}_unanswered": n for name, n in self._unanswered.items()},
        }
        if not due:
            return None
        self._scalars["shadow_trajectories"] = float(len(compared))
        return ShadowInputs(frozenset(compared), by_route)

    async def stepped(self, version: int, outcome: StepOutcome) -> None:
        """Tell them that the weights are those of `version`, and what their own step had shown."""
        if outcome.shadow_failure:
            self._failed("comparison", outcome.shadow_failure)
        for name in self._started:
            scalars = outcome.shadows.get(name, {})
            await self._guarded(name, self._routes[name].stepped(version, scalars))

    def scalars(self) -> dict[str, float]:
        """Return the figures of the step asked about last."""
        return self._scalars

    async def _answer(
        self, route: OldLogprobRoute, members: Sequence[Scored], version: int
    ) -> OldLogprobs:
        found: list[OldLogprobs] = []

        async def ask() -> None:
            found.append(await route.at_step(members, version))

        await self._guarded(route.name, ask())
        return (
            found[0]
            if found
            else OldLogprobs({}, RouteCost(held_bytes=self._held.get(route.name, 0)))
        )

    async def _guarded(self, name: str, work: Awaitable[None]) -> bool:
        try:
            await work
        except Exception as error:  # noqa: BLE001 - a shadow never stops the run
            self._failed(name, error)
            return False
        return True

    def _failed(self, name: str, error: Exception | str) -> None:
        reason = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
        self._context.count("shadow_failures")
        if self._reasons.get(name) != reason:
            self._reasons[name] = reason
            self._context.log.warning("shadow_failed", shadow=name, reason=reason)


def _logprobs(scores: Sequence[SequenceScore], member: Scored, *, exact: bool) -> Logprobs:
    """Return arrays [T]; of an exact route NaN where a version's numbers are not exact."""
    found: Logprobs = []
    for score, sequence in zip(scores, member.trajectory.sequences, strict=True):
        values_T = np.array(score.old_logprobs.numpy())
        known = {entry.version for entry in score.versions if entry.status == "exact"}
        for span in sequence.spans if exact else ():
            if span.version not in known:
                values_T[span.start : span.stop] = np.nan
        found.append(values_T)
    return found
