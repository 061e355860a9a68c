"""What trackers are given: step reports and evaluations as named scalars of a version. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from shared.algo.pass_at_k import at_k
from shared.wire.journal import Evaluated
from shared.wire.telemetry import StepReport


@dataclass(frozen=True, slots=True)
class Point:
    """Scalars that belong to one version."""

    version: int
    at: float
    """Unix seconds."""
    scalars: Mapping[str, float]


def of_step(report: StepReport) -> Point:
    """Return every scalar of a step report as `train/<name>`."""
    scalars = {f"train/{name}": value for name, value in sorted(report.scalars.items())}
    return Point(report.version, report.trained_at, scalars)


def of_evaluation(result: Evaluated, at: float, *, samples: int, success: float) -> Point:
    """Return avg@k, pass@k and pass^k with their 95 % intervals as `eval_<name>/<figure>`.

    Args:
        result: as journalled.
        at: Unix seconds it was journalled at.
        samples: `learner.eval.samples`, k.
        success: `learner.eval.success_reward`.
    """
    under = f"eval_{result.name}"
    scalars = {
        f"{under}/episodes": float(len(result.rewards)),
        f"{under}/failed": float(result.num_failed),
    }
    found = at_k(result.task_indices, result.rewards, samples, success)
    if found is not None:
        figures = {"avg": found.avg, "pass": found.passes, "all_pass": found.all_pass}
        for name, figure in figures.items():
            tag = f"{under}/{name}_at_{found.samples}"
            scalars |= {tag: figure.mean, f"{tag}_low": figure.low, f"{tag}_high": figure.high}
    return Point(result.version, at, scalars)


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield a configuration's leaves by dotted name."""
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
