"""How far routes are from the exact answer on one batch, before its first optimizer step.

Shapes: N loss tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from services.learner.items import BatchItems, pack_items
from shared.algo.batching import PackedBatch
from shared.algo.loss_report import TokenTrace
from shared.algo.policy_loss import MinibatchLoss, PolicyLoss, count
from shared.algo.route_health import Decisions, decision_differences, route_error

Sums = dict[str, list[float]]
"""Per-age sums, addable over batches."""


@dataclass(frozen=True)
class Forward:
    """A forward that was run before, in the place of a new one."""

    logprobs_T: torch.Tensor
    entropy_T: torch.Tensor | None = None


@dataclass(frozen=True)
class Arrival:
    """What the loss makes of one route's numbers when the batch arrives."""

    trace: TokenTrace
    scalars: Mapping[str, float]
    """Of the loss's own report, as after a first minibatch."""


def arrival(loss: PolicyLoss, items: BatchItems, start: BatchItems, *, version: int) -> Arrival:
    """Run the loss on a whole batch without a step.

    Args:
        loss: with the route's proxy, if it has one.
        items: with the route's old log-probs.
        start: the same items with the log-probs of the current weights in their place.
        version: the batch is trained from.
    """
    batch, now = _packed(items), _packed(start)
    minibatch: MinibatchLoss = loss.minibatch(count([batch]), version_now=version)
    with torch.no_grad():
        minibatch(Forward(now.per_token["old_logprobs"]), batch)
    scalars, _ = minibatch.report(scatter_size=0)
    return Arrival(minibatch.traces[0], scalars)


def differences(
    route: Arrival, exact: Arrival, *, version: int, num_ages: int
) -> tuple[dict[str, float], Sums]:
    """Return error and wrong decisions of a route: means over tokens, and sums by age."""
    ages_N = version - exact.trace.versions_N
    # log D differs by exactly what the old log-prob differs by: the sampler's is the same.
    scalars, by_age = route_error(
        route.trace.log_d_N, exact.trace.log_d_N, ages_N, num_ages=num_ages
    )
    scalars |= decision_differences(_decisions(exact.trace), _decisions(route.trace))
    return scalars, {name: values.tolist() for name, values in by_age.items()}


def added(total: Sums, part: Sums) -> Sums:
    """Add sums by age."""
    return {k: (np.array(total.get(k, 0.0)) + np.array(v)).tolist() for k, v in part.items()}


def means(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Average every scalar over the batches that have it."""
    names = {name for row in rows for name in row}
    return {
        name: float(np.mean([row[name] for row in rows if name in row])) for name in sorted(names)
    }


def _packed(items: BatchItems) -> PackedBatch:
    return pack_items(items.items)


def _decisions(trace: TokenTrace) -> Decisions:
    return Decisions(
        rejected_N=torch.stack(list(trace.rejected.values())).any(0),
        cut_N=torch.stack(list(trace.cut.values())).any(0),
    )
