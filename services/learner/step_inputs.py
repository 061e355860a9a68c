"""What a step needs beside its trajectories: old log-probs, reference, shadows.

Everything that the trained route and those who look on carry from step to step is started, saved,
loaded and told of a step here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from services.learner.items import BatchItems, build_items
from services.learner.positions import Positions
from services.learner.reference import Reference
from services.learner.routes.base import OldLogprobRoute, OldLogprobs
from services.learner.routes.carried import Nested
from services.learner.score_store import ScoreStore
from services.learner.shadows import Shadows
from services.learner.staging import Scored
from services.learner.trainer import StepOutcome
from shared.backends.base import Snapshot
from shared.wire.journal import Batch

ANCHOR = "anchor"
"""Folder of the anchor inside a checkpoint."""


@dataclass(frozen=True)
class Prepared:
    """A batch ready to be trained on."""

    items: BatchItems
    old: OldLogprobs
    members: tuple[Scored, ...]
    compare: bool
    """Whether shadows look on."""


class StepInputs:
    """The routes of one learner process, and the model of its KL term."""

    def __init__(
        self,
        route: OldLogprobRoute,
        shadows: Shadows,
        reference: Reference | None,
        store: ScoreStore,
        positions: Positions,
        anchor: OldLogprobRoute | None = None,
    ) -> None:
        """Take them together; `anchor` answers for π_prox under objective four_policy."""
        self.route = route
        self._anchor = anchor
        self.shadows = shadows
        self._reference = reference
        self._store = store
        self._positions = positions

    async def start(self) -> None:
        """Begin, after the learner knows which version it stands at."""
        await self.route.start()
        if self._anchor is not None:
            await self._anchor.start()
        await self.shadows.start()

    async def close(self) -> None:
        await self.route.close()
        if self._anchor is not None:
            await self._anchor.close()
        await self.shadows.close()

    def snapshot(self) -> Snapshot:
        """Copy what `load` needs of a checkpoint to go on identically."""
        folders = {ANCHOR: self._anchor.snapshot()} if self._anchor is not None else {}
        return Nested(folders, (self.route.snapshot(), self.shadows.snapshot()))

    def load(self, folder: Path) -> None:
        self.route.load(folder)
        # A checkpoint from before the anchor was configured has none: it starts afresh.
        if self._anchor is not None and (folder / ANCHOR).is_dir():
            self._anchor.load(folder / ANCHOR)
        self.shadows.load(folder)

    async def prepare(
        self, batch: Batch, members: dict[str, Scored], *, reported: bool
    ) -> Prepared:
        """Compute what the step from `batch.version` is trained on.

        Args:
            batch: as journalled.
            members: its trajectories, by ticket id.
            reported: the step is executed again, and its report is on the log already.
        """
        scored = tuple(members.values())
        old = await self.route.at_step(scored, batch.version)
        reference = await self._reference.logprobs(scored) if self._reference else None
        prox = await self._anchor.at_step(scored, batch.version) if self._anchor else None
        shadows = await self.shadows.ask(batch, members, reported=reported)
        items = build_items(
            batch, members, old.by_ticket, reference, shadows, prox.by_ticket if prox else None
        )
        return Prepared(items, old, scored, compare=shadows is not None)

    async def stepped(self, version: int, outcome: StepOutcome) -> None:
        """Tell the routes that the weights are now those of `version`, not yet published."""
        await self.route.stepped(version, outcome.scalars)
        if self._anchor is not None:
            # The step's ratios are those to π_old: resets that compare the anchor with the samples
            # need its own, which nobody measures.
            await self._anchor.stepped(version, {})
        await self.shadows.stepped(version, outcome)

    async def store(self, prepared: Prepared) -> None:
        """Put the scores on the log that the route itself computed under exact versions."""
        if not self.route.stores_scores:
            return
        last = await self._store.store(prepared.members, prepared.old.by_ticket)
        self._positions.next["scores"] = max(self._positions.next["scores"], last + 1)

    def scalars(self, old: OldLogprobs) -> dict[str, float]:
        """Return what the step's old log-probs and shadows cost and showed."""
        return {
            "old_logprobs_s": old.cost.seconds,
            "old_logprobs_forward_tokens": float(old.cost.forward_tokens),
            "old_logprobs_held_bytes": float(old.cost.held_bytes),
            "fallback_tokens": float(old.fallback_tokens),
            **old.health,
            **self.shadows.scalars(),
        }
