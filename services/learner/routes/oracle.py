"""`oracle`: a dedicated service scores every token under its own version (exact, the default)."""

from __future__ import annotations

from collections.abc import Sequence

from services.learner.routes.base import OldLogprobs, RouteBase, RouteCost
from services.learner.staging import Scored


class OracleRoute(RouteBase):
    """Joins what logit_oracle stored; costs nothing on the learner's critical path."""

    name = "oracle"
    exact = True
    waits_for_scores = True

    async def at_step(self, members: Sequence[Scored], version: int) -> OldLogprobs:
        return OldLogprobs({member.ticket_id: member.scores for member in members}, RouteCost())
