"""From finished cells to `routes.json` and the printed tables. Nulls are printed as nulls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from shared.cli.bench_routes_cells import METHODS, Cell
from shared.cli.bench_routes_confirm import beside, choose, corrected, family, summaries
from shared.cli.bench_routes_cost import MODELS, assumptions
from shared.cli.bench_routes_store import Row, Store

PROTOCOL = "docs/routes_protocol.md"


def report(
    store: Store,
    cells: Callable[[str], list[Cell] | None],
    cost_rows: Sequence[Mapping[str, Any]] | None,
) -> dict[str, Any]:
    """Return the whole result, of whatever is finished."""
    stages: dict[str, Any] = {}
    for stage in ("error", "tune", "confirm", "sweeps"):
        wanted = list(dict.fromkeys(cells(stage) or []))
        found = store.found(wanted)
        if found:
            stages[stage] = {
                "kind": "confirmatory" if stage == "confirm" else "exploratory",
                "cells": len(wanted),
                "finished": len(found),
                "complete": len(found) == len(wanted),
                **_PARTS[stage](found, complete=len(found) == len(wanted)),
            }
    return {
        "protocol": PROTOCOL,
        "size": asdict(store.size),
        "cost": None
        if cost_rows is None
        else {"kind": "measured", "rows": list(cost_rows), "assumed": assumptions()},
        **stages,
    }


def _error_part(found: Mapping[Cell, Row], *, complete: bool) -> dict[str, Any]:
    return {"rows": error_rows(found)}


def error_rows(found: Mapping[Cell, Row]) -> list[dict[str, Any]]:
    """Return error and wrong decisions by discrepancy, lag and route, averaged over runs."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for cell, row in found.items():
        for route in row["errors"]:
            groups.setdefault((cell.sampler, cell.lag, route), []).append(row)
    rows: list[dict[str, Any]] = []
    for (sampler, lag, route), runs in groups.items():
        errors = [run["errors"][route] for run in runs]
        names = sorted({name for one in errors for name in one})
        counts = np.sum([run["by_age"][route]["age_count"] for run in runs], 0)
        sums = np.sum([run["by_age"][route]["age_error_sum"] for run in runs], 0)
        rows.append(
            {
                "sampler": sampler,
                "lag": lag,
                "route": route,
                "runs": len(runs),
                **{name: float(np.mean([one[name] for one in errors])) for name in names},
                "age_count": counts.tolist(),
                "age_error_mean": (sums / np.maximum(counts, 1.0)).tolist(),
            }
        )
    return rows


def _tune_part(found: Mapping[Cell, Row], *, complete: bool) -> dict[str, Any]:
    chosen = choose(found, complete=len(found) if complete else 0)
    return {
        "rows": summaries(found),
        "chosen": None
        if chosen is None
        else {sampler: asdict(one) for sampler, one in chosen.items()},
    }


def _confirm_part(found: Mapping[Cell, Row], *, complete: bool) -> dict[str, Any]:
    contrasts = family(found)
    errors = {cell: row for cell, row in found.items() if cell.label == "error"}
    return {
        # A verdict on half of the seeds would be a look at the data.
        "family": corrected(contrasts) if complete else contrasts,
        "beside": beside(found),
        "rows": summaries(found),
        "errors": error_rows(errors),
        "failures": [
            {"cell": row["cell"], "failure": row["failure"]}
            for row in found.values()
            if row["failure"]
        ],
    }


def _sweeps_part(found: Mapping[Cell, Row], *, complete: bool) -> dict[str, Any]:
    groups: dict[Any, list[Row]] = {}
    for cell, row in found.items():
        knobs = (cell.setting, cell.beta, cell.auto_reset)
        at = (cell.label, cell.sampler, cell.lag, cell.route, *knobs)
        groups.setdefault(at, []).append(row)
    return {
        "rows": [
            {
                "label": label,
                "sampler": sampler,
                "lag": lag,
                "route": route,
                "clip": setting.clip,
                "mask": list(setting.mask),
                "beta": beta,
                "auto_reset": auto_reset,
                "runs": len(runs),
                "auc": float(np.mean([run["auc"] for run in runs])),
                "final": float(np.mean([run["final"] for run in runs])),
                "collapsed": sum(bool(run["collapsed"]) for run in runs),
                "rejected": float(np.mean([run["steps"].get("rej_any", 0.0) for run in runs])),
                "resets": float(np.mean([_resets(run, route) for run in runs])),
                "error_mean": _error_of(runs, route, "error_mean"),
                "wrong_any": _error_of(runs, route, "wrong_any"),
                "versions": [v for v, _ in runs[0]["curve"]],
                "curve": np.mean([[s for _, s in run["curve"]] for run in runs], 0).tolist(),
            }
            for (label, sampler, lag, route, setting, beta, auto_reset), runs in groups.items()
        ]
    }


def _error_of(runs: Sequence[Row], route: str, name: str) -> float | None:
    found = [run["errors"][route][name] for run in runs if name in run["errors"].get(route, {})]
    return float(np.mean(found)) if found else None


def _resets(run: Row, route: str) -> float:
    """Return how often the run's anchor was reset, all causes together."""
    health = run["health"].get(route, {})
    return sum(value for name, value in health.items() if name.startswith("ewma_resets_"))


_PARTS: Mapping[str, Callable[..., dict[str, Any]]] = {
    "error": _error_part,
    "tune": _tune_part,
    "confirm": _confirm_part,
    "sweeps": _sweeps_part,
}


def tables(result: Mapping[str, Any]) -> list[str]:
    """Return the lines to print."""
    lines: list[str] = []
    if result["cost"]:
        lines += _cost_table(result["cost"]["rows"])
    for stage in ("error", "confirm"):
        if stage in result:
            part = result[stage]
            rows = part["rows"] if stage == "error" else part["errors"]
            lines += ["", f"{stage} ({part['kind']}, {part['finished']}/{part['cells']} runs)"]
            lines += [
                f"  {row['sampler']:4} lag {row['lag']:6} {row['route']:22} |error| "
                f"{row['error_mean']:.4f}  wrong {row['wrong_any']:7.3%}"
                for row in rows
            ]
    for stage in ("tune", "confirm"):
        if stage in result:
            lines += ["", f"{stage}: AUC and final return, mean ± s.e., collapsed"]
            lines += [_return_line(row) for row in sorted(result[stage]["rows"], key=_order)]
    if "confirm" in result:
        lines += ["", "the family, Holm over all of it"]
        lines += [_contrast_line(one) for one in result["confirm"]["family"]]
        lines += ["", "beside it, no claim"]
        lines += [_contrast_line(one) for one in result["confirm"]["beside"]]
    if "sweeps" in result:
        lines += ["", "sweeps (exploratory)"]
        lines += [
            f"  {row['label']:10} {row['sampler']:4} lag {row['lag']:6} {row['route']:22} clip "
            f"{row['clip']:g} mask {row['mask']} beta {row['beta']} reset {row['auto_reset']}: "
            f"auc {row['auc']:.3f} "
            f"final {row['final']:.3f} collapsed {row['collapsed']}/{row['runs']}"
            for row in result["sweeps"]["rows"]
        ]
    return lines


def _order(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return (row["sampler"], row["label"], METHODS.index(row["route"]), str(row["setting"]))


def _return_line(row: Mapping[str, Any]) -> str:
    at = row["setting"]
    return (
        f"  {row['sampler']:4} {row['label']:8} {row['route']:22} lr {at['lr']:g} clip "
        f"{at['clip']:g} mask {list(at['mask'])}: auc {row['auc'][0]:.3f} ± {row['auc'][1]:.3f}  "
        f"final {row['final'][0]:.3f} ± {row['final'][1]:.3f}  {row['collapsed']}/{row['runs']}"
    )


def _contrast_line(one: Mapping[str, Any]) -> str:
    interval = one.get("interval")
    shown = f"[{interval[0]:+.3f}, {interval[1]:+.3f}]" if interval else ""
    verdict = f"  Holm {one['p_holm']:.2g} {one['verdict']}" if "p_holm" in one else ""
    return (
        f"  {one['kind']:7} {one['sampler']:4} {one['outcome']:10} {one['first']} - "
        f"{one['second']}: {one['difference']:+.3f} {shown} n {one['pairs']} p {one['p']:.2g}"
        f"{verdict}"
    )


def _cost_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = ["cost per step: measured here | extrapolated (assumptions in routes.json) | paper"]
    for row in rows:
        parts = [
            f"  {row['route']:22} path {row['critical_s'] * 1e3:6.1f} ms  total "
            f"{row['total_cpu_s'] * 1e3:6.1f} ms  idle {row['idle_s'] * 1e3:5.1f} ms  "
            f"{row['held_bytes'] / 1e6:6.2f} MB"
        ]
        for model in MODELS:
            far = row["extrapolated"][model.name]
            paper = (
                "-" if far["paper_gb"] is None else f"{far['paper_gb']} GB {far['paper_s']:.0f} s"
            )
            parts.append(
                f"{model.name} {far['gb']:.1f} GB {far['critical_s']:.1f} s path "
                f"{far['total_s']:.1f} s total, paper {paper}"
            )
        lines.append(" | ".join(parts))
    return lines
