"""`rollout`: the sampler's own log-probs stand in for the old ones (bypass): D = 1, S = ρ."""

from __future__ import annotations

from collections.abc import Sequence

from services.learner.routes.base import OldLogprobs, RouteBase, RouteCost
from services.learner.routes.forwards import as_scores, sampler_logprobs
from services.learner.staging import Scored
from shared.backends.trajectory_scoring import score_dtype


class Rollout(RouteBase):
    """No forward at all; the clip acts on discrepancy and staleness together."""

    name = "rollout"
    exact = False

    async def at_step(self, members: Sequence[Scored], version: int) -> OldLogprobs:
        dtype = score_dtype(self._context.backend.dtype)
        return OldLogprobs(
            {
                m.ticket_id: as_scores(m.trajectory, sampler_logprobs(m.trajectory), dtype)
                for m in members
            },
            RouteCost(),
        )
