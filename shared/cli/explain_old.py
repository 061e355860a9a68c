"""Old log-probs as a run's route gave them: from the archive where stored, else computed again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np

from services.learner.routes.forwards import as_scores, sampler_logprobs
from services.learner.staging import Scored
from shared.algo.proximal import Proxy
from shared.backends.trajectory_scoring import pieces_of
from shared.cli.explain_policies import ArchivedPolicies, Logprobs
from shared.cli.explained import OldSource
from shared.wire.messages import SequenceScore
from shared.wire.trajectory import Trajectory

Old = tuple[SequenceScore, ...]
Status = Literal["exact", "approximate", "unverified"]

STORED = ("oracle", "interrupt")
"""Routes whose scores are on the bus before the step, and named by its batch."""
PROXIES: dict[str, Proxy] = {
    "interp_prox_loglinear": "loglinear",
    "interp_prox_linear": "linear",
}
_RECOMPUTED = {
    "snapshot_old": "each token's own version",
    "current_recompute": "the version stepped from",
    "ewma_prox": "the average of the versions, moved as the step reports say",
    "ppo_ewma_async": "the average of the versions, moved as the step reports say",
}


class RouteOld:
    """What `old_logprobs.route` gave for the trajectories of one step."""

    def __init__(self, route: str, version: int, policies: ArchivedPolicies) -> None:
        """Answer for the step from `version`."""
        self._route = route
        self._version = version
        self._policies = policies

    @property
    def proxy(self) -> Proxy | None:
        return PROXIES.get(self._route)

    @property
    def source(self) -> OldSource:
        if self._route in STORED:
            return "archived"
        if self._route in PROXIES:
            return "interpolated"
        if self._route in _RECOMPUTED:
            return "recomputed"
        return "sampler" if self._route == "rollout" else "unknown"

    @property
    def note(self) -> str:
        """Where the numbers come from."""
        if self.source == "archived":
            return f"old: as stored for route {self._route} and joined by the learner"
        if self.source == "sampler":
            return "old: route rollout, the sampler's own log-probs by definition (D = 1)"
        if self.source == "interpolated":
            return (
                f"old: route {self._route} stores none; computed by the loss's own function from "
                "the archived sampler's and the recomputed current log-probs"
            )
        if self.source == "unknown":
            return f"old: route {self._route} is not known to this release"
        stores = "stores none"
        if self._route == "snapshot_old":
            stores = "stores them after the step, which the audit compares"
        return (
            f"old: route {self._route} {stores}; recomputed by the audit's float64 forward "
            f"under {_RECOMPUTED[self._route]} (equal up to the learner's rounding)"
        )

    def of(self, member: Scored) -> Old:
        """Return the old log-probs of one trajectory; NaN where they cannot be had."""
        if self._route in STORED:
            return member.scores
        ticket_id, played = member.ticket_id, member.trajectory
        compute: dict[str, Callable[[], Logprobs]] = {
            "snapshot_old": lambda: self._policies.stamped(ticket_id, played),
            "current_recompute": lambda: self._policies.under(self._version, ticket_id, played),
            "ewma_prox": lambda: self._policies.anchored(self._version, ticket_id, played),
            "ppo_ewma_async": lambda: self._policies.anchored(self._version, ticket_id, played),
        }
        if self.source in ("sampler", "interpolated"):
            values = sampler_logprobs(played)
        else:
            values = compute[self._route]()
        return as_scores(played, _zero_elsewhere(played, values), "f8", self._status(played))

    def _status(self, played: Trajectory) -> dict[int, Status]:
        """Return the provenance by version that the route claims."""
        if self._route != "snapshot_old":
            return {}
        pieces = pieces_of(played, kind="packed", temperature=1.0)
        inexact = {piece.version for piece in pieces if not piece.can_be_exact}
        return {p.version: "unverified" if p.version in inexact else "exact" for p in pieces}


def _zero_elsewhere(played: Trajectory, values: Logprobs) -> Logprobs:
    return [
        np.where(sequence.loss_mask.numpy().astype(bool), array, 0.0)
        for sequence, array in zip(played.sequences, values, strict=True)
    ]
