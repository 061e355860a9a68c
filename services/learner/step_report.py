"""The report of one optimisation round, for the `stats` log. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from services.learner.staging import Scored
from services.learner.trainer import StepOutcome
from shared.weights.publisher import Published
from shared.wire.base import Array
from shared.wire.journal import Batch
from shared.wire.telemetry import StepReport


def step_report(
    batch: Batch,
    members: Collection[Scored],
    outcome: StepOutcome,
    published: Published | None,
    times: tuple[float, float],
    *,
    dispatched_lengths: Sequence[int],
    further: Mapping[str, float],
) -> StepReport:
    """Return the report of the step from `batch.version`.

    Args:
        batch: as journalled.
        members: its trajectories.
        outcome: the trainer's.
        published: the new version; None where it was committed already.
        times: Unix seconds when the step began and when it was trained.
        dispatched_lengths: sampled tokens of trajectories that arrived since the last report.
        further: scalars that only the learner knows.
    """
    rewards = [m.trajectory.reward for m in members]
    lengths = [sum(int(s.loss_mask.numpy().sum()) for s in m.trajectory.sequences) for m in members]
    scalars = {
        **outcome.scalars,
        "success": float(np.mean([r > 0 for r in rewards])) if rewards else 0.0,
        "reward_mean": float(np.mean(rewards)) if rewards else 0.0,
        "k3_d": outcome.scalars.get("d_k3", 0.0),
        "k3_s": outcome.scalars.get("s_k3", 0.0),
        "ess_ratio": outcome.scalars.get("rho_ess_ratio", 1.0),
        "rejected_ratio": outcome.scalars.get("rej_any", 0.0),
        "entropy": outcome.scalars.get("entropy_mean", 0.0),
        "train_s": times[1] - times[0],
        "publish_s": published.seconds if published else 0.0,
        "publish_bytes": float(published.num_bytes) if published else 0.0,
        "trained_tickets": float(len(members)),
        "zero_variance_groups": float(sum(bool(g.no_loss) for g in batch.groups)),
        **further,
    }
    arrays = {
        name: Array.of(values, "f4" if name.endswith("scatter") else "f8")
        for name, values in outcome.arrays.items()
    }
    arrays["dispatched_lengths"] = Array.of(dispatched_lengths, "i4")
    arrays["trained_lengths"] = Array.of(lengths, "i4")
    return StepReport(
        version=batch.version + 1,
        started_at=times[0],
        trained_at=times[1],
        published_at=published.manifest.published_at if published else times[1],
        scalars=scalars,
        arrays=arrays,
    )


def headline(scalars: dict[str, float]) -> dict[str, float]:
    """Return what a version's line in the log shows."""
    names = ("success", "staleness_mean", "staleness_max", "loss", "grad_norm", "k3_d", "wait_s")
    return {name: round(scalars.get(name, 0.0), 5) for name in (*names, "train_s")}
