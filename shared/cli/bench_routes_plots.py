"""The figures of `make bench-routes`, as small SVG files. One function each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shared.cli.bench_routes_cells import LAGS, METHODS, SAMPLERS
from shared.cli.report_style import FULL, C, figure, legend_above, standalone

COLOURS = dict(
    zip(
        METHODS,
        (C["blue"], C["red"], C["muted"], C["amber"], C["age4"], C["green"], C["violet"]),
        strict=True,
    )
)

Rows = Sequence[Mapping[str, Any]]


def draw(result: Mapping[str, Any], folder: Path) -> list[str]:
    """Write every figure there is data for; return their names."""
    figures: dict[str, Callable[[], str]] = {}
    if "error" in result:
        rows = result["error"]["rows"]
        figures["routes_error_by_lag.svg"] = lambda: by_lag(
            rows, "error_mean", "mean |error| of the old log-prob, nats"
        )
        figures["routes_wrong_by_lag.svg"] = lambda: by_lag(
            rows, "wrong_any", "share of wrong decisions"
        )
        figures["routes_error_by_age.svg"] = lambda: error_by_age(rows)
    if "confirm" in result:
        figures["routes_return.svg"] = lambda: returns(result["confirm"]["rows"], "tuned")
        figures["routes_return_shared.svg"] = lambda: returns(result["confirm"]["rows"], "shared")
    if "sweeps" in result:
        swept = result["sweeps"]["rows"]
        figures["routes_thresholds.svg"] = lambda: thresholds(swept)
        figures["routes_beta.svg"] = lambda: beta(swept)
        figures["routes_reset.svg"] = lambda: resets(swept)
        figures["routes_return_by_lag.svg"] = lambda: by_lag(
            [row for row in swept if row["label"] == "lags"], "final", "final return"
        )
    for name, make in figures.items():
        (folder / name).write_text(standalone(make()))
    return list(figures)


def by_lag(rows: Rows, name: str, title: str) -> str:
    """One figure of every route against the fixed lag; mixed ages to the right."""
    lags = [lag for lag in LAGS if any(row["lag"] == lag for row in rows)]
    with figure(FULL, 3.3, columns=len(SAMPLERS)) as sheet:
        for axis, sampler in zip(sheet.axes, SAMPLERS, strict=True):
            for route in METHODS:
                points = sorted(
                    (lags.index(row["lag"]), row[name])
                    for row in rows
                    if (row["sampler"], row["route"]) == (sampler, route) and row["lag"] in lags
                )
                fixed = [point for point in points if lags[point[0]] != "mixed8"]
                mixed = [point for point in points if point not in fixed]
                for part, style in ((fixed, "o-"), (mixed, "D")):
                    axis.plot(
                        [x for x, _ in part], [y for _, y in part], style, color=COLOURS[route],
                        label=route if part is fixed else None, markersize=4,
                    )  # fmt: skip
            axis.set_xticks(range(len(lags)), lags)
            axis.set_xlabel(f"lag in versions, {sampler} sampler")
        sheet.axes[0].set_ylabel(title)
        legend_above(sheet.axes[0])
    return sheet.svg


def error_by_age(rows: Rows) -> str:
    """Mean |error| by token age where trajectories span versions."""
    with figure(FULL, 3.3, columns=len(SAMPLERS)) as sheet:
        for axis, sampler in zip(sheet.axes, SAMPLERS, strict=True):
            for row in rows:
                if row["sampler"] != sampler or row["lag"] != "mixed8" or row["route"] == "oracle":
                    continue
                counts = np.array(row["age_count"])
                seen = np.flatnonzero(counts >= 20)
                axis.plot(
                    seen, np.array(row["age_error_mean"])[seen], "o-", markersize=4,
                    color=COLOURS.get(row["route"], C["ink"]), label=row["route"],
                )  # fmt: skip
            axis.set_xlabel(f"token age in versions, mixed lag 8, {sampler} sampler")
        sheet.axes[0].set_ylabel("mean |error|, nats")
        legend_above(sheet.axes[0])
    return sheet.svg


def returns(rows: Rows, label: str) -> str:
    """Mean return over versions, every method."""
    with figure(FULL, 3.3, columns=len(SAMPLERS)) as sheet:
        for axis, sampler in zip(sheet.axes, SAMPLERS, strict=True):
            for row in rows:
                if (row["sampler"], row["label"]) == (sampler, label):
                    axis.plot(
                        row["versions"], row["curve"], color=COLOURS[row["route"]],
                        label=row["route"], linewidth=1.8,
                    )  # fmt: skip
            axis.set_xlabel(f"version, {label} setting, {sampler} sampler")
        sheet.axes[0].set_ylabel("success on held-out maps")
        legend_above(sheet.axes[0])
    return sheet.svg


def thresholds(rows: Rows) -> str:
    """Final return over mask and clip, exact beside current_recompute."""
    chosen = [row for row in rows if row["label"] == "thresholds"]
    masks = sorted({tuple(row["mask"]) for row in chosen}, key=lambda mask: mask[1])
    clips = sorted({row["clip"] for row in chosen})
    routes = ("oracle", "current_recompute")
    with figure(FULL, 5.6, rows=len(SAMPLERS), columns=2) as sheet:
        panels = [(sampler, route) for sampler in SAMPLERS for route in routes]
        for axis, (sampler, route) in zip(sheet.axes, panels, strict=True):
            grid = np.full((len(masks), len(clips)), np.nan)
            for row in chosen:
                if (row["sampler"], row["route"]) == (sampler, route):
                    at = masks.index(tuple(row["mask"])), clips.index(row["clip"])
                    grid[at] = row["final"]
            axis.imshow(grid, cmap="Blues", vmin=0.0, vmax=0.8, aspect="auto")
            axis.grid(visible=False)
            for (i, j), value in np.ndenumerate(grid):
                shown = "" if np.isnan(value) else f"{value:.2f}"
                colour = C["page"] if value > 0.45 else C["ink"]
                axis.text(j, i, shown, ha="center", va="center", color=colour)
            axis.set_xticks(range(len(clips)), [f"{clip:g}" for clip in clips])
            axis.set_yticks(range(len(masks)), [f"[{a:g}, {b:g}]" for a, b in masks])
            axis.set_title(f"{route}, {sampler}: final return")
            axis.set_xlabel("clip on S")
    return sheet.svg


def beta(rows: Rows) -> str:
    """Error and final return of fixed decays; the lines are age tracking, dotted without resets."""
    chosen = [row for row in rows if row["label"] == "beta"]
    with figure(FULL, 3.3, columns=2) as sheet:
        for axis, name in zip(sheet.axes, ("error_mean", "final"), strict=True):
            for sampler, colour in zip(SAMPLERS, (C["blue"], C["amber"]), strict=True):
                own = [row for row in chosen if row["sampler"] == sampler]
                fixed = sorted(
                    (row["beta"], row[name]) for row in own if row["beta"] and row[name] is not None
                )
                axis.plot(
                    [b for b, _ in fixed], [y for _, y in fixed], "o-", color=colour,
                    label=f"fixed, {sampler}",
                )  # fmt: skip
                for row in own:
                    if row["route"] == "ppo_ewma_async" and row[name] is not None:
                        free = row["auto_reset"] is False
                        axis.axhline(
                            row[name], color=colour, linestyle=":" if free else "--",
                            label=f"age-tracking{', no resets' if free else ''}, {sampler}",
                        )  # fmt: skip
            axis.set_xlabel("beta")
            axis.set_ylabel({"error_mean": "mean |error|, nats", "final": "final return"}[name])
        legend_above(sheet.axes[0])
    return sheet.svg


def resets(rows: Rows) -> str:
    """Return across a lag of 8, then 0, then 8, with and without automatic resets."""
    chosen = [row for row in rows if row["label"] == "reset"]
    with figure(FULL, 3.3, columns=len(SAMPLERS)) as sheet:
        for axis, sampler in zip(sheet.axes, SAMPLERS, strict=True):
            for row in chosen:
                if row["sampler"] != sampler:
                    continue
                on = row["auto_reset"]
                axis.plot(
                    row["versions"], row["curve"], "-" if on else "--",
                    color=COLOURS[row["route"]],
                    label=f"{row['route']}, reset {'on' if on else 'off'}",
                )  # fmt: skip
            axis.set_xlabel(f"version, {sampler} sampler")
        sheet.axes[0].set_ylabel("success on held-out maps")
        legend_above(sheet.axes[0])
    return sheet.svg
