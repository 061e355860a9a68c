"""`report.html`: one self-contained page about a run, readable without network or scripts."""

from __future__ import annotations

import json
import math
from importlib import resources
from pathlib import Path
from typing import Any, cast

import jinja2
from markupsafe import Markup

from shared.cli import (
    report_evaluations,
    report_explained,
    report_figures,
    report_header,
    report_panels,
    report_shadows,
    report_system,
    summary,
)
from shared.cli.ledger import Ledger, of_run
from shared.cli.records import RunRecords, load
from shared.cli.report_data import cloud, evaluations, pooled, regions, steps
from shared.cli.report_style import css_variables, standalone
from shared.cli.report_trajectory import explain
from shared.cli.time_use import busy_grid, lives
from shared.cli.token_text import shown
from shared.runtime.errors import ConfigError

_GRID_S = 2.0


def write(run_dir: Path) -> Path:
    """Write `report.html` into the run folder; `summary.json` is written first when missing.

    Raises:
        ConfigError: the folder holds no archive.
    """
    records = load(run_dir)
    ledger = of_run(records)
    path = run_dir / "summary.json"
    facts = cast("dict[str, Any]", json.loads(path.read_text())) if path.is_file() else None
    page = render(records, ledger, facts or summary.write(run_dir))
    target = run_dir / "report.html"
    target.write_text(page)
    return target


def render(records: RunRecords, ledger: Ledger, facts: dict[str, Any]) -> str:
    """Return the page."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.filters.update(shown=shown, nats=_nats, ratio=_ratio, signed=_signed, plain=_plain)
    source = resources.files("shared.cli").joinpath("report.html.j2").read_text(encoding="utf-8")
    context = {
        "css_variables": Markup(css_variables()),
        "run_dir": str(records.run_dir),
        "s": facts,
        **report_header.header(records, facts),
        **_figures(records, ledger),
        **report_panels.exactness(summary.read_audit(records.run_dir)),
        **report_shadows.panel(steps(records), report_shadows.by_age(steps(records))),
        **report_panels.corrections(records),
        **report_panels.distributions(records, ledger),
        **report_panels.time_use(records, facts),
        **report_panels.ledger_rows(records, ledger),
        **report_panels.weights(records),
        **report_explained.trajectory(explain(records, ledger)),
        **report_panels.reproduce(records),
        "evaluation_table": report_evaluations.table(records),
    }
    return environment.from_string(source).render(context)


def plot_k3_by_age(run_dir: Path, path: Path) -> None:
    """Write the figure of the README: k3 of D by token age, as a standalone SVG.

    Raises:
        ConfigError: the run has no such figures.
    """
    found = report_shadows.by_age(steps(load(run_dir)))
    if found is None:
        raise ConfigError(
            f"run folder {run_dir}: no step report carries k3 by age; set "
            "old_logprobs.shadow: [current_recompute]"
        )
    path.write_text(standalone(report_shadows.k3_curves(found)))


def _figures(records: RunRecords, ledger: Ledger) -> dict[str, Markup | None]:
    """Draw what there is data for."""
    reports = steps(records)
    shadows = report_shadows.by_age(reports)
    tokens = cloud(records)
    processes = lives(records.leases)
    grid = busy_grid(processes, _GRID_S)
    bound = int(records.setting("admission.max_staleness", 4))
    has_lengths = len(pooled(reports, "trained_lengths")) > 0
    drawn = {
        "success": report_figures.success(records) if reports or evaluations(records) else None,
        "k3": report_shadows.k3_curves(shadows) if shadows else None,
        "errors": report_shadows.error_curves(shadows) if shadows and shadows.error else None,
        "scatter": report_figures.scatter(tokens, regions(records)) if tokens else None,
        "staleness": report_figures.staleness(ledger, bound) if ledger.age_tokens else None,
        "lengths": report_figures.lengths(records) if has_lengths else None,
        "overlap": report_system.overlap(records, processes, grid) if grid else None,
        "weight_bytes": report_system.weight_bytes(records) if records.manifests else None,
        "publish_seconds": report_system.publish_seconds(records) if reports else None,
    }
    return {name: Markup(svg) if svg else None for name, svg in drawn.items()}


def _nats(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.4f}".replace("-", "−")


def _ratio(log_ratio: float) -> str:
    return "–" if math.isnan(log_ratio) else f"{math.exp(log_ratio):.3f}"


def _signed(value: float, form: str = "+.3f") -> str:
    return "–" if math.isnan(value) else format(value, form).replace("-", "−")


def _plain(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}"
