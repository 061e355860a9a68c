"""`current_recompute`: the current weights stand in for the behaviour version. A baseline.

At the first minibatch S = 1 whatever the age, and D carries the staleness: masks on D then act on
the wrong quantity (arXiv 2605.12070; `docs/algorithms.md`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from services.learner.routes.base import OldLogprobs, RouteBase, RouteCost
from services.learner.routes.forwards import Logprobs, as_scores, forward_members
from services.learner.staging import Scored
from shared.backends.trajectory_scoring import score_dtype


class CurrentRecompute(RouteBase):
    """One forward of the batch under the version stepped from."""

    name = "current_recompute"
    exact = False

    async def at_step(self, members: Sequence[Scored], version: int) -> OldLogprobs:
        started = time.perf_counter()
        found, forwarded = await self._forward(members)
        dtype = score_dtype(self._context.backend.dtype)
        return OldLogprobs(
            {m.ticket_id: as_scores(m.trajectory, found[m.ticket_id], dtype) for m in members},
            RouteCost(time.perf_counter() - started, forwarded),
        )

    async def _forward(self, members: Sequence[Scored]) -> tuple[dict[str, Logprobs], int]:
        context = self._context
        return await asyncio.to_thread(
            forward_members,
            context.backend,
            members,
            temperature=context.temperature,
            pack_tokens=context.pack_tokens,
        )
