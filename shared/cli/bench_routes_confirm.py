"""What tuning chooses, and the family of contrasts of `docs/routes_protocol.md`. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from shared.cli.bench_routes_cells import (
    APPROXIMATE,
    EXACT,
    GRID,
    METHODS,
    Cell,
    Chosen,
    Sampler,
    Setting,
)
from shared.cli.bench_routes_statistics import holm, mcnemar_p, paired
from shared.cli.bench_routes_store import Row

LEVEL = 0.05

ERROR_CONTRASTS = (
    ("current_recompute", "ppo_ewma_async"),
    ("current_recompute", "ewma_prox"),
    ("ewma_prox", "ppo_ewma_async"),
)
ERROR_OUTCOMES = ("error_mean", "wrong_any")

Rows = Mapping[Cell, Row]
Value = Callable[[Row], float]


def choose(found: Rows, *, complete: int) -> dict[Sampler, Chosen] | None:
    """Return shared and tuned settings by discrepancy; None while a tuning run is missing."""
    if not complete or len(found) < complete:
        return None
    chosen: dict[Sampler, Chosen] = {}
    for sampler in samplers(found):
        auc = {
            route: {at: _mean_auc(found, sampler, route, at) for at in _grid(found)}
            for route in METHODS
        }
        averaged = {at: float(np.mean([auc[r][at] for r in METHODS])) for at in _grid(found)}
        chosen[sampler] = Chosen(
            shared=_best(averaged),
            tuned={route: _best(by_setting) for route, by_setting in auc.items()},
        )
    return chosen


def samplers(found: Rows) -> list[Sampler]:
    """Return the discrepancies that occur, in order."""
    return list(dict.fromkeys(cell.sampler for cell in found))


def family(found: Rows) -> list[dict[str, Any]]:
    """Return the contrasts in order, with Holm's correction over all of them.

    `p_holm` and `verdict` are set only by `corrected`, once every cell is there.
    """
    contrasts: list[dict[str, Any]] = []
    for sampler in samplers(found):
        for first, second in ERROR_CONTRASTS:
            for outcome in ERROR_OUTCOMES:
                left = _by_seed(found, sampler, "error", EXACT, _error(first, outcome))
                right = _by_seed(found, sampler, "error", EXACT, _error(second, outcome))
                contrasts.append(_compared(sampler, outcome, first, second, left, right, kind="E"))
        contrasts += _returns(found, sampler, "tuned", "tuned", "auc", kind="R")
        contrasts += _collapses(found, sampler, "tuned", kind="C")
    return [one for one in contrasts if one["pairs"]]


def corrected(contrasts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add the adjusted p-values and what follows from them."""
    adjusted = holm([one["p"] for one in contrasts])
    return [
        {**one, "p_holm": p, "verdict": "difference" if p <= LEVEL else "null"}
        for one, p in zip(contrasts, adjusted, strict=True)
    ]


def beside(found: Rows) -> list[dict[str, Any]]:
    """Return what is reported without a claim."""
    rows: list[dict[str, Any]] = []
    for sampler in samplers(found):
        rows += _returns(found, sampler, "tuned", "tuned", "final", kind="tuned")
        for outcome in ("auc", "final"):
            rows += _returns(found, sampler, "shared", "shared", outcome, kind="shared")
            rows += _returns(found, sampler, "matched", "tuned", outcome, kind="matched")
        rows += _collapses(found, sampler, "shared", kind="shared")
    return [one for one in rows if one["pairs"]]


def summaries(found: Rows) -> list[dict[str, Any]]:
    """Return mean, standard error and collapses of every method, setting and discrepancy."""
    groups: dict[tuple[str, str, str, Setting], list[Row]] = {}
    for cell, row in found.items():
        if cell.label != "error":
            key = (cell.sampler, cell.label, cell.route, cell.setting)
            groups.setdefault(key, []).append(row)
    return [
        {
            "sampler": sampler,
            "label": label,
            "route": route,
            "setting": asdict(setting),
            "runs": len(rows),
            "auc": _spread(row["auc"] for row in rows),
            "final": _spread(row["final"] for row in rows),
            "collapsed": sum(bool(row["collapsed"]) for row in rows),
            "curve": np.mean([[s for _, s in row["curve"]] for row in rows], 0).tolist(),
            "versions": [v for v, _ in rows[0]["curve"]],
        }
        for (sampler, label, route, setting), rows in groups.items()
    ]


def _spread(values: Iterable[float]) -> tuple[float, float]:
    """Return mean and standard error."""
    array = np.array(list(values))
    error = float(array.std(ddof=1) / len(array) ** 0.5) if len(array) > 1 else float("nan")
    return float(array.mean()), error


def _grid(found: Rows) -> list[Setting]:
    asked = {cell.setting for cell in found}
    return [setting for setting in GRID if setting in asked]


def _best(values: Mapping[Setting, float]) -> Setting:
    """Return the first of the largest: ties go to what the grid names first."""
    return max(values, key=lambda setting: values[setting])


def _mean_auc(found: Rows, sampler: str, route: str, setting: Setting) -> float:
    values = [
        row["auc"]
        for cell, row in found.items()
        if (cell.sampler, cell.route, cell.setting) == (sampler, route, setting)
    ]
    return float(np.mean(values))


def _by_seed(found: Rows, sampler: str, label: str, route: str, value: Value) -> dict[int, float]:
    return {
        cell.seed: value(row)
        for cell, row in found.items()
        if (cell.sampler, cell.label, cell.route) == (sampler, label, route)
    }


def _error(route: str, outcome: str) -> Value:
    return lambda row: float(row["errors"][route][outcome])


def _returns(
    found: Rows, sampler: str, exact_label: str, label: str, outcome: str, *, kind: str
) -> list[dict[str, Any]]:
    exact = _by_seed(found, sampler, exact_label, EXACT, lambda row: float(row[outcome]))
    return [
        _compared(
            sampler,
            outcome,
            EXACT,
            route,
            exact,
            _by_seed(found, sampler, label, route, lambda row: float(row[outcome])),
            kind=kind,
        )
        for route in APPROXIMATE
    ]


def _compared(
    sampler: str,
    outcome: str,
    first: str,
    second: str,
    left: Mapping[int, float],
    right: Mapping[int, float],
    *,
    kind: str,
) -> dict[str, Any]:
    seeds = sorted(left.keys() & right.keys())
    head: dict[str, Any] = {
        "kind": kind,
        "sampler": sampler,
        "outcome": outcome,
        "first": first,
        "second": second,
        "pairs": len(seeds),
    }
    if not seeds:
        return head
    result = paired([left[seed] - right[seed] for seed in seeds])
    return head | {
        "first_mean": float(np.mean([left[seed] for seed in seeds])),
        "second_mean": float(np.mean([right[seed] for seed in seeds])),
        "difference": result.mean,
        "interval": [result.low, result.high],
        "p": result.p,
    }


def _collapses(found: Rows, sampler: str, label: str, *, kind: str) -> list[dict[str, Any]]:
    def collapsed(route: str) -> dict[int, float]:
        return _by_seed(found, sampler, label, route, lambda row: float(row["collapsed"]))

    exact = collapsed(EXACT)
    rows: list[dict[str, Any]] = []
    for route in APPROXIMATE:
        other = collapsed(route)
        seeds = sorted(exact.keys() & other.keys())
        only_exact = sum(exact[s] > other[s] for s in seeds)
        only_other = sum(other[s] > exact[s] for s in seeds)
        rows.append(
            {
                "kind": kind,
                "sampler": sampler,
                "outcome": "collapsed",
                "first": EXACT,
                "second": route,
                "pairs": len(seeds),
                "first_mean": sum(exact[s] for s in seeds),
                "second_mean": sum(other[s] for s in seeds),
                "difference": float(only_exact - only_other),
                "p": mcnemar_p(only_exact, only_other),
            }
        )
    return rows
