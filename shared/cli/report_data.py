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
class K3ByAge:
    """k3 of the discrepancy by token age, old logits exact and recomputed from current weights."""

    ages: npt.NDArray[np.int64]
    """Ages with enough tokens to say something."""
    tokens: F8
    exact: F8
    current: F8

    @property
    def reading(self) -> str:
        """What the figure says, with its numbers."""
        oldest = int(self.ages[-1])
        exact = self.exact[-1] / self.exact[0] if self.exact[0] > 0 else math.nan
        current = self.current[-1] / self.exact[-1] if self.exact[-1] > 0 else math.nan
        times = f"{current:,.0f}" if current >= 10 else f"{current:.1f}"
        return (
            f"With exact old logits the discrepancy is the sampler's rounding noise at any age "
            f"(×{exact:.2f} from age {self.ages[0]} to {oldest}). Recomputed from the current "
            f"weights, policy change leaks into it: {times} times the exact value at age {oldest}, "
            "and every mask on D then acts on staleness."
        )


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


def k3_by_age(reports: Iterable[StepReport], min_tokens: float = 30.0) -> K3ByAge | None:
    """Return mean k3 by age over the run, None when no report carries the shadow route."""
    names = ("age_shadow_tokens", "age_k3_d_exact", "age_k3_d_current_recompute")
    sums: dict[str, F8] = {}
    for report in reports:
        if not all(name in report.arrays for name in names):
            continue
        for name in names:
            values = report.arrays[name].numpy().astype(np.float64)
            known = sums.get(name, np.zeros(0))
            width = max(len(known), len(values))
            sums[name] = _padded(known, width) + _padded(values, width)
    if not sums:
        return None
    tokens, exact, current = (sums[name] for name in names)
    ages = np.flatnonzero(tokens >= min_tokens)
    if not len(ages):
        return None
    return K3ByAge(ages, tokens[ages], exact[ages] / tokens[ages], current[ages] / tokens[ages])


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


def _padded(values: F8, width: int) -> F8:
    return np.concatenate([values, np.zeros(width - len(values))])
