"""What the report says of routes that looked on: error by age, and decisions that differ."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from shared.cli.report_data import F8, series
from shared.cli.report_style import FULL, HALF, C, figure, legend_above
from shared.wire.telemetry import StepReport

_SUM = re.compile(r"shadow_(\w+)_age_(count|k3_d_sum|error_sum|bias_sum|wrong_sum)")
_COLOURS = {
    "current_recompute": "red", "ewma_prox": "amber", "ppo_ewma_async": "violet",
    "interp_prox_loglinear": "green", "interp_prox_linear": "age1", "rollout": "muted",
    "oracle": "blue", "snapshot_old": "age2", "interrupt": "blue",
}  # fmt: skip
COLUMNS = (
    ("error_mean", "mean |error|, nats", "{:.4f}"), ("error_p99", "p99", "{:.3f}"),
    ("error_bias", "bias", "{:+.4f}"), ("wrongly_rejected", "wrongly rejected", "{:.2%}"),
    ("wrongly_kept", "wrongly kept", "{:.2%}"), ("wrongly_cut", "wrongly clipped", "{:.2%}"),
    ("wrongly_uncut", "wrongly not clipped", "{:.2%}"),
    ("clipped_on_arrival", "outside the clip on arrival", "{:.2%}"),
)  # fmt: skip
"""Scalar of a step, heading, format of its mean over the run."""


@dataclass(frozen=True)
class ByAge:
    """Means by token age over a run; an age with too few tokens is left out."""

    reference: str
    """The exact route that the others are held against; "" without one."""
    ages: np.ndarray
    tokens: F8
    """Compared tokens of the reference, else of the first route."""
    k3: Mapping[str, F8]
    """Of D̃, by route, the reference included."""
    error: Mapping[str, F8] = field(default_factory=dict[str, F8])
    """Mean |ℓ̃ - ℓ^old| in nats, by route that has an exact answer."""
    wrong: Mapping[str, F8] = field(default_factory=dict[str, F8])
    """Share of tokens that are masked or clipped otherwise than by the exact route."""

    @property
    def k3_reading(self) -> str:
        """What the figure of k3 says, with its numbers."""
        others = [name for name in self.k3 if name != self.reference]
        if not self.reference or not others:
            return "No exact route looked on or was trained on: there is nothing to compare with."
        name = "current_recompute" if "current_recompute" in others else others[0]
        exact, other = self.k3[self.reference], self.k3[name]
        oldest = int(self.ages[-1])
        flat = exact[-1] / exact[0] if exact[0] > 0 else np.nan
        leak = other[-1] / exact[-1] if exact[-1] > 0 else np.nan
        times = f"{leak:,.0f}" if leak >= 10 else f"{leak:.1f}"
        why = (
            "Recomputed from the current weights, policy change leaks into it"
            if name == "current_recompute"
            else f"Under {name} it is another quantity"
        )
        return (
            f"With exact old logits the discrepancy is the sampler's rounding noise at any age "
            f"(×{flat:.2f} from age {self.ages[0]} to {oldest}). {why}: {times} times the exact "
            f"value at age {oldest}, and every mask on D then acts on staleness."
        )

    @property
    def error_reading(self) -> str:
        """What the figure of errors says, with its numbers."""
        oldest = int(self.ages[-1])
        ranked = sorted(self.error, key=lambda name: float(self.error[name][-1]))
        parts = [
            f"{name} {self.error[name][-1]:.3f} nats ({self.wrong[name][-1]:.1%} of tokens decided "
            "otherwise)"
            for name in ranked
        ]
        return f"Mean |error| at age {oldest}: {', '.join(parts)}."


def by_age(reports: Iterable[StepReport], min_tokens: float = 30.0) -> ByAge | None:
    """Return means by age over the run, None when no report carries a comparison."""
    sums: dict[str, dict[str, F8]] = {}
    for report in reports:
        for name, array in report.arrays.items():
            if found := _SUM.fullmatch(name):
                own = sums.setdefault(found.group(1), {})
                own[found.group(2)] = _added(own.get(found.group(2)), array.numpy())
    if not sums:
        return None
    exact = [name for name, own in sums.items() if "error_sum" not in own]
    reference = exact[0] if len(exact) < len(sums) else ""
    tokens = sums[reference or next(iter(sums))]["count"]
    ages = np.flatnonzero(tokens >= min_tokens)
    if not len(ages):
        return None

    def means(what: str) -> dict[str, F8]:
        return {
            name: own[what][ages] / np.maximum(own["count"][ages], 1.0)
            for name, own in sorted(sums.items())
            if what in own
        }

    return ByAge(
        reference, ages, tokens[ages], means("k3_d_sum"), means("error_sum"), means("wrong_sum")
    )


def panel(reports: Sequence[StepReport], found: ByAge | None) -> dict[str, Any]:
    """Return the table of routes and the readings."""
    rows: list[dict[str, Any]] = []
    for name in found.error if found else ():
        means = {key: series(reports, f"shadow_{name}_{key}") for key, *_ in COLUMNS}
        rows.append(
            {
                "name": name,
                "colour": _COLOURS.get(name, "muted"),
                "cells": [
                    shape.format(np.nanmean(means[key])) if np.isfinite(means[key]).any() else "–"
                    for key, _, shape in COLUMNS
                ],
            }
        )
    seconds = series(reports, "shadow_s")
    held = series(reports, "shadow_held_bytes")
    cost = ""
    if np.isfinite(seconds).any():
        cost = (
            f" Asking them took {1e3 * np.nanmean(seconds):.1f} ms per step and held "
            f"{np.nanmax(held) / 2**20:.1f} MiB beyond the learner's weights."
        )
    return {
        "k3_reading": found.k3_reading if found else "",
        "shadow_rows": rows,
        "shadow_columns": [heading for _, heading, _ in COLUMNS],
        "shadow_reference": found.reference if found else "",
        "shadow_reading": found.error_reading + cost if found and found.error else "",
    }


def k3_curves(found: ByAge) -> str:
    """k3 of D by token age: exact beside what others make of it."""
    with figure(HALF + 0.6, 3.3) as sheet:
        axis = sheet.axes[0]
        for name, values in found.k3.items():
            if not (values > 0).any():
                continue  # D = 1 by definition: nothing to draw on this scale
            axis.plot(
                found.ages, np.where(values > 0, values, np.nan), "o-",
                color=_colour(name, found), linewidth=2, markersize=5,
                label="exact old logits" if name == found.reference else name,
            )  # fmt: skip
        positive = np.concatenate(list(found.k3.values()))
        positive = positive[positive > 0]
        if len(positive):
            axis.set_yscale("log")
            axis.set_ylim(positive.min() / 3, positive.max() * 4)
        share = found.tokens / found.tokens.sum()
        axis.set_xticks(
            found.ages, [f"{a}\n{s:.0%}" for a, s in zip(found.ages, share, strict=True)]
        )
        legend_above(axis)
        axis.set_xlabel("token age in versions, share of tokens below")
        axis.set_ylabel("mean k3 of D, nats")
    return sheet.svg


def error_curves(found: ByAge) -> str:
    """Mean |error| and share of decisions that differ, by token age."""
    with figure(FULL, 3.2, columns=2) as sheet:
        for axis, rows in zip(sheet.axes, (found.error, found.wrong), strict=True):
            for name, values in rows.items():
                axis.plot(
                    found.ages, values, "o-", color=_colour(name, found), linewidth=2,
                    markersize=4.5, label=name,
                )  # fmt: skip
            axis.set_xticks(found.ages)
            axis.set_ylim(bottom=0)
            axis.set_xlabel("token age in versions")
        legend_above(sheet.axes[0], columns=3)
        sheet.axes[0].set_ylabel("mean |ℓ̃ − ℓ old|, nats")
        sheet.axes[1].set_ylabel("share masked or clipped otherwise")
    return sheet.svg


def _colour(name: str, found: ByAge) -> str:
    return C["blue"] if name == found.reference else C[_COLOURS.get(name, "muted")]


def _added(known: F8 | None, values: Any) -> F8:
    more = np.asarray(values, np.float64)
    if known is None:
        return more
    width = max(len(known), len(more))
    return np.pad(known, (0, width - len(known))) + np.pad(more, (0, width - len(more)))
