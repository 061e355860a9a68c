"""`make bench-routes`: every old-logit route against the exact answer, and what it costs.

Stages in order: cost, error, tune, confirm, sweeps. Every finished training run is a line of
`routes_cells.jsonl`; started again, the command runs what is missing. `docs/routes_protocol.md`
was written before the confirmation was run.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from shared.cli import bench_routes_cells as plan
from shared.cli.bench_routes_cells import QUICK, Cell, Size
from shared.cli.bench_routes_confirm import choose
from shared.cli.bench_routes_cost import cost_cell, cost_size, costs, matched_versions
from shared.cli.bench_routes_report import report, tables
from shared.cli.bench_routes_store import Row, Store, run_missing

STAGES = ("cost", "error", "tune", "confirm", "sweeps")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages, print the tables; 1 while something is missing."""
    arguments = _parser().parse_args(argv)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")  # before a worker imports torch
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    bench = _Bench(arguments)
    missing = 0
    for stage in arguments.stage or STAGES:
        missing += bench.run(stage)
    result = report(bench.store, bench.cells, bench.cost_rows())
    path: Path = arguments.out / "routes.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print("\n".join(tables(result)))
    if not arguments.no_plots:
        from shared.cli.bench_routes_plots import draw

        for name in draw(result, arguments.out):
            print(arguments.out / name)
    print(path)
    return 1 if missing else 0


class _Bench:
    """The stages over one store."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        out: Path = arguments.out
        out.mkdir(parents=True, exist_ok=True)
        self.size: Size = QUICK if arguments.quick else Size()
        self.store = Store(out / "routes_cells.jsonl", self.size)
        self._bases = out / "routes_bases"
        self._seeds: int | None = 1 if arguments.quick else arguments.seeds
        self._quick: bool = arguments.quick
        self._jobs: int = arguments.jobs
        minutes: float | None = arguments.minutes
        self._until = float("inf") if minutes is None else time.monotonic() + 60.0 * minutes

    def run(self, stage: str) -> int:
        """Run a stage; return how many of its cells are missing."""
        cells = self.cells(stage)
        if cells is None:
            print(f"# {stage}: needs the stages before it, complete", flush=True)
            return 1
        size = cost_size(self.size) if stage == "cost" else self.size
        # Costs are measured alone: a neighbour on the other core would be in them.
        missing = run_missing(
            cells,
            self.store,
            self._bases,
            size=size,
            jobs=min(self._jobs, 1) if stage == "cost" else self._jobs,
            until=self._until,
            tell=lambda done, total, row: _tell(stage, done, total, row),
        )
        if missing:
            print(f"# {stage}: {missing} cells missing; run it again", flush=True)
        return missing

    def cells(self, stage: str) -> list[Cell] | None:
        """Return a stage's cells; None while what they depend on is missing."""
        match stage:
            case "cost":
                return [cost_cell()]
            case "error":
                return self._few(plan.error_cells(self._of(plan.ERROR_SEEDS)))
            case "tune":
                return self._few(plan.tune_cells(self._of(plan.TUNE_SEEDS)))
            case "confirm":
                tuning = self.cells("tune") or []
                chosen = choose(self.store.found(tuning), complete=len(set(tuning)))
                rows = self.cost_rows()
                if chosen is None or rows is None:
                    return None
                matched = matched_versions(rows, self.size.versions)
                return plan.confirm_cells(chosen, matched, self._of(plan.CONFIRM_SEEDS))
            case _:
                return self._few(plan.sweep_cells(self._of(plan.SWEEP_SEEDS)))

    def cost_rows(self) -> list[dict[str, object]] | None:
        """Return the cost table, None while it is not measured."""
        row = self.store.get(cost_cell(), cost_size(self.size))
        return None if row is None else costs(row)

    def _of(self, seeds: range) -> Sequence[int]:
        return seeds[: self._seeds] if self._seeds else seeds

    def _few(self, cells: list[Cell]) -> list[Cell]:
        """Under --quick: one grid point, one discrepancy and two lags are enough."""
        if not self._quick:
            return cells
        return [
            cell
            for cell in cells
            if cell.sampler == "int4"
            and cell.lag in ("2", "mixed8", "jump")
            and (cell.stage != "tune" or cell.setting in plan.GRID[:2])
            and cell.setting.mask in ((0.5, 2.0), (0.8, 1.25))
            and cell.beta in (None, 0.5)
        ]


def _tell(stage: str, done: int, total: int, row: Row) -> None:
    cell = plan.cell_of(dict(row["cell"]))
    print(
        f"{stage:8} {done:4}/{total:<4} {cell.route:22} {cell.sampler:4} lag {cell.lag:6} "
        f"seed {cell.seed:5} {cell.setting.label:34} auc {row['auc']:.3f} final {row['final']:.3f}"
        f"{' COLLAPSED' if row['collapsed'] else ''}  {row['seconds']:.1f} s",
        flush=True,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m shared.cli.bench_routes")
    parser.add_argument("--stage", action="append", choices=STAGES, help="repeatable")
    parser.add_argument("--seeds", type=int, help="only the first so many of each stage")
    parser.add_argument("--jobs", type=int, default=2, help="processes; 0: in this one")
    parser.add_argument("--minutes", type=float, help="begin no run after so long")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    parser.add_argument("--quick", action="store_true", help="tiny sizes: figures mean nothing")
    parser.add_argument("--no-plots", action="store_true")
    return parser


if __name__ == "__main__":
    sys.exit(main())
