"""The numbers behind the report's figures, from records. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from shared.algo.correction_specs import IcePop, TokenMask
from shared.cli.records import RunRecords
from shared.cli.summary import bootstrap_mean
from shared.runtime.algo_section import AlgoSection
from shared.runtime.config import describe
from shared.runtime.errors import ConfigError
from shared.runtime.sections import EXACT_ROUTES
from shared.wire.journal import Evaluated
from shared.wire.telemetry import StepReport

F8 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Evaluation:
    """One evaluation with the 95 % interval of its mean."""

    name: str
    version: int
    at_s: float
    mean: float
    low: float
    high: float
    episodes: int


@dataclass(frozen=True)
class Regions:
    """What the configured mask and clip accept, in log space."""

    mask: tuple[float, float] | None
    """Bounds on log D; None when nothing is rejected by D."""
    clip: tuple[float, float]
    """Bounds on log S."""
    kind: str


def start_of(records: RunRecords) -> float:
    """Return Unix seconds of the run's start: the zero of its time axis."""
    known: list[float] = (
        [float(records.facts["started_at"])] if "started_at" in records.facts else []
    )
    known += [at for at, _ in records.journal[:1]]
    return min(known, default=0.0)


def evaluations(records: RunRecords) -> list[Evaluation]:
    """Return all evaluations in order of time."""
    start = start_of(records)
    found: list[Evaluation] = []
    for written_at, body in records.journal:
        if isinstance(body, Evaluated) and body.rewards:
            rewards = np.array(body.rewards)
            low, high = bootstrap_mean(rewards)
            found.append(
                Evaluation(
                    body.name, body.version, written_at - start, float(rewards.mean()), low, high,
                    len(rewards),
                )
            )  # fmt: skip
    return found


def steps(records: RunRecords) -> list[StepReport]:
    """Return step reports by version."""
    return [records.steps[version] for version in sorted(records.steps)]


def series(reports: Iterable[StepReport], name: str) -> F8:
    """Return one scalar over versions, NaN where a report lacks it."""
    return np.array([report.scalars.get(name, math.nan) for report in reports])


def pooled(reports: Iterable[StepReport], name: str) -> npt.NDArray[Any]:
    """Return one array of all reports, laid end to end (empty when none has it)."""
    parts = [r.arrays[name].numpy() for r in reports if name in r.arrays]
    parts = [part for part in parts if part.size]
    return np.concatenate(parts) if parts else np.zeros(0)


@dataclass(frozen=True)
class Cloud:
    """(log D, log S, age) of sampled tokens."""

    points: npt.NDArray[np.float64]
    """[M, 3]."""
    exact: bool
    """Whether D and S are those of an exact route, trained on or looking on."""
    route: str
    """Whose D and S they are; "" for an exact shadow's."""

    def kept(self, region: Regions) -> tuple[float, float, float]:
        """Return the shares kept by both regions, by the rectangle only, by the strip only.

        The strip is what the same mask keeps under current_recompute, whose clip holds nothing
        back at the start of a step.
        """
        log_d, log_s = self.points[:, 0], self.points[:, 1]
        left, right = region.mask or (-np.inf, np.inf)
        low, high = region.clip
        inside = (log_d >= left) & (log_d <= right) & (log_s >= low) & (log_s <= high)
        strip = (log_d + log_s >= left) & (log_d + log_s <= right)
        return (
            float((inside & strip).mean()),
            float((inside & ~strip).mean()),
            float((strip & ~inside).mean()),
        )


def cloud(records: RunRecords) -> Cloud | None:
    """Return the run's sampled tokens; those of an exact reference where one looked on."""
    reports, route = steps(records), str(records.setting("old_logprobs.route", "oracle"))
    found = pooled(reports, "exact_scatter")
    by_shadow = len(found) > 0
    points = (found if by_shadow else pooled(reports, "scatter")).reshape(-1, 3)
    if not len(points):
        return None
    exact = by_shadow or route in EXACT_ROUTES
    return Cloud(points.astype(np.float64), exact, "" if by_shadow else route)


def regions(records: RunRecords) -> Regions:
    """Return the acceptance regions of the run's configuration.

    Raises:
        ConfigError: it is of another release.
    """
    tree = cast("dict[str, Any]", records.setting("learner.algo", {}))
    try:
        algo = AlgoSection.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(
            f"run folder {records.run_dir}: `learner.algo` in resolved.yaml: {describe(error)}"
        ) from error
    mask = None
    for spec in algo.corrections:
        if isinstance(spec, IcePop | TokenMask):
            mask = (math.log(max(spec.low, 1e-9)), math.log(spec.high))
    low, high = algo.settings().clip_bounds
    clip = (math.log1p(-min(low, 1 - 1e-9)), math.log1p(high))
    return Regions(mask, clip, ", ".join(spec.kind for spec in algo.corrections) or "none")


def smoothed(values: F8, window: int) -> F8:
    """Return the centred moving mean, shorter at the ends."""
    kernel = np.ones(window)
    known = np.isfinite(values)
    weight = np.convolve(known.astype(float), kernel, mode="same")
    total = np.convolve(np.where(known, values, 0.0), kernel, mode="same")
    return np.divide(total, weight, out=np.full(len(values), np.nan), where=weight > 0)
