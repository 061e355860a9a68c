"""`make bench-demo`: the demo over several seeds, a table and `runs/bench/demo.json`."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

KEYS = (
    "seed", "success_base", "success_final", "success_lift_ci", "staleness_max",
    "staleness_bound", "wall_s", "trajectories_lost", "trajectories_duplicated",
    "audit_mismatches", "ok",
)  # fmt: skip
"""Of each run's summary, kept in the result."""

BASE_AT_MOST = 0.15
FINAL_AT_LEAST = 0.60
MEAN_AT_LEAST = 0.68
COLLAPSED_BELOW = 0.35
"""What a path that ignores the map gets."""

SHARE_OF_SEEDS = 0.9


def main(argv: Sequence[str] | None = None) -> int:
    """Run the seeds one after another; 0 when every aggregate criterion holds."""
    parser = argparse.ArgumentParser(prog="python -m shared.cli.bench_demo")
    parser.add_argument("--seeds", type=int, default=10, help="how many, from --first on")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    parser.add_argument("demo", nargs="*", help="further arguments of `lagwise demo`, after --")
    arguments = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    print(header())
    for seed in range(arguments.first, arguments.first + arguments.seeds):
        rows.append(_play(seed, arguments.out / f"demo-{seed}", arguments.demo))
        print(line(rows[-1]), flush=True)
    problems, means = judge(rows), aggregate(rows)
    result = {"runs": rows, **means, "ok": not problems, "problems": problems}
    path = arguments.out / "demo.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    base, final = means["success_base_mean"], means["success_final_mean"]
    print(f"mean success {base:.3f} before, {final:.3f} after")
    print("\n".join(["NOT OK:", *problems] if problems else ["OK"]))
    print(path)
    return 1 if problems else 0


def aggregate(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return means over the runs that ended; a run without a figure counts as 0 success."""
    count = max(1, len(rows))
    return {
        "success_base_mean": sum(_number(row, "success_base") for row in rows) / count,
        "success_final_mean": sum(_number(row, "success_final") for row in rows) / count,
        "wall_s_max": max((_number(row, "wall_s") for row in rows), default=0.0),
    }


def judge(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return which aggregate criteria fail, empty when all hold."""
    problems: list[str] = []
    learned = [
        row
        for row in rows
        if row.get("success_final") is not None
        and _number(row, "success_base") <= BASE_AT_MOST
        and _number(row, "success_final") >= FINAL_AT_LEAST
    ]
    if len(learned) < SHARE_OF_SEEDS * len(rows):
        problems.append(
            f"{len(learned)} of {len(rows)} seeds went from <= {BASE_AT_MOST} to"
            f" >= {FINAL_AT_LEAST}"
        )
    mean = aggregate(rows)["success_final_mean"]
    if mean < MEAN_AT_LEAST:
        problems.append(f"mean success {mean:.3f} is below {MEAN_AT_LEAST}")
    for row in rows:
        seed = f"seed {row.get('seed')}"
        if row.get("success_final") is None:
            problems.append(f"{seed}: the run did not end ({row.get('error', 'no summary')})")
            continue
        if _number(row, "success_final") < COLLAPSED_BELOW:
            problems.append(f"{seed}: collapsed to {row['success_final']:.3f}")
        bound = row.get("staleness_bound") or 0
        if not 0 < _number(row, "staleness_max") <= bound:
            problems.append(f"{seed}: staleness {row.get('staleness_max')} is not in 1..{bound}")
        problems += [
            f"{seed}: {key} is {row.get(key)}"
            for key in ("trajectories_lost", "trajectories_duplicated", "audit_mismatches")
            if row.get(key) != 0
        ]
    return problems


def header() -> str:
    """Return the table's first line."""
    return (
        f"{'seed':>4} {'base':>6} {'final':>6} {'95 % of the lift':>18} {'stale':>5}"
        f" {'wall s':>6} {'lost':>4} {'dup':>3} {'mism':>4}  ok"
    )


def line(row: Mapping[str, Any]) -> str:
    """Return one run as a line of the table."""
    if row.get("success_final") is None:
        return f"{row.get('seed'):>4} did not end: {row.get('error', 'no summary')}"
    low, high = row.get("success_lift_ci") or (float("nan"), float("nan"))
    return (
        f"{row['seed']:>4} {_number(row, 'success_base'):>6.3f} {row['success_final']:>6.3f}"
        f" {f'{low:+.3f} .. {high:+.3f}':>18} {row.get('staleness_max'):>5}"
        f" {_number(row, 'wall_s'):>6.0f} {row.get('trajectories_lost'):>4}"
        f" {row.get('trajectories_duplicated'):>3} {row.get('audit_mismatches'):>4}"
        f"  {'yes' if row.get('ok') else 'no'}"
    )


def _play(seed: int, run_dir: Path, extra: Sequence[str]) -> dict[str, Any]:
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable, "-m", "shared.cli.main", "demo", "--json",
        "--seed", str(seed), "--run-dir", str(run_dir), *extra,
    ]  # fmt: skip
    log = run_dir.with_suffix(".log")
    with log.open("w") as errors:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, check=False
        )
    try:
        summary = json.loads(done.stdout)
    except ValueError:
        return {"seed": seed, "ok": False, "error": f"exit code {done.returncode}, see {log}"}
    return {**{key: summary.get(key) for key in KEYS}, "seed": seed}


def _number(row: Mapping[str, Any], key: str) -> float:
    value = row.get(key)
    return float(value) if isinstance(value, int | float) else 0.0


if __name__ == "__main__":
    sys.exit(main())
