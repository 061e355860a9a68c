"""What a run of `make bench-routes` leaves behind, and its outcomes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shared.cli.bench_routes_errors import Sums, means

COLLAPSED_BELOW = 0.5
"""Of the best progress evaluation."""

STUCK_BELOW = 0.40
STUCK_MIXED = 0.05
STUCK_VERSIONS = 10
"""Stuck: in the last versions hardly a group has two outcomes, and the return is about that of the
best fixed path, 0.35: the policy is deterministic and ignores the map."""

REPORTED = (
    "d_k3", "s_k3", "rej_any", "clipped_on_arrival", "contributing", "staleness_mean",
    "versions_per_trajectory", "mixed_version_ratio", "grad_norm", "loss_tokens", "skipped_steps",
    "ess_ratio", "num_loss_tokens",
)  # fmt: skip
"""Of the trainer's scalars, averaged over the run."""


@dataclass
class Book:
    """What a run leaves behind."""

    evals: list[tuple[int, float]] = field(default_factory=list[tuple[int, float]])
    errors: dict[str, list[dict[str, float]]] = field(
        default_factory=dict[str, list[dict[str, float]]]
    )
    by_age: dict[str, Sums] = field(default_factory=dict[str, Sums])
    costs: dict[str, list[dict[str, float]]] = field(
        default_factory=dict[str, list[dict[str, float]]]
    )
    health: dict[str, list[dict[str, float]]] = field(
        default_factory=dict[str, list[dict[str, float]]]
    )
    """Further scalars of a route, by version."""
    steps: list[dict[str, float]] = field(default_factory=list[dict[str, float]])
    trained: list[float] = field(default_factory=list[float])
    """Mean reward of every batch."""
    mixed: list[float] = field(default_factory=list[float])
    """Share of groups with two outcomes."""

    def cost(self, name: str, **figures: float) -> None:
        self.costs.setdefault(name, []).append(figures)

    def outcome(self, points: Sequence[int], failure: str) -> dict[str, Any]:
        """Return the figures of the run.

        Args:
            points: versions that were to be evaluated; one that was not counts as a return of 0.
            failure: why the run ended early, empty when it did not.
        """
        done = dict(self.evals)
        curve = [done.get(version, 0.0) for version in points]
        best, final = max(curve), curve[-1]
        mixed = self.mixed[-STUCK_VERSIONS:]
        stuck = final < STUCK_BELOW and sum(mixed) < STUCK_MIXED * len(mixed)
        return {
            "failure": failure,
            "base": done.get(0, 0.0),
            "curve": [[v, s] for v, s in zip(points, curve, strict=True)],
            "trained": self.trained,
            "mixed": self.mixed,
            "auc": sum(curve) / len(curve),
            "final": final,
            "collapsed": bool(failure) or stuck or final < COLLAPSED_BELOW * best,
            "errors": {name: means(rows) for name, rows in self.errors.items()},
            "by_age": self.by_age,
            "costs": {name: means(rows) for name, rows in self.costs.items()},
            "health": {
                name: {**means(rows), **_counters(rows[-1])} for name, rows in self.health.items()
            },
            "steps": {
                name: value
                for name, value in means(self.steps).items()
                if name in REPORTED and math.isfinite(value)
            },
        }


def _counters(last: Mapping[str, float]) -> dict[str, float]:
    """Return the counts of resets at the end of the run: their mean says nothing."""
    return {name: value for name, value in last.items() if name.startswith("ewma_resets_")}
