"""`make bench-weights`: what publishing costs, a table and `runs/bench/weights.json`.

Each case is measured in processes of its own: the codec on one core, then publication to followers
over a real nats-server. The versions come from a real, small training run or from a synthetic model
of the size that counts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shared.cli.bench_weights_cases import Case, Training, full, quick
from shared.cli.bench_weights_limits import header, judge, line
from shared.cli.bench_weights_load import OtherLoad
from shared.cli.processes import child_environment

PART_WITHIN_S = 900.0
"""A part that takes longer hangs."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; 0 unless something went wrong. A missed limit is printed, and 1 with --strict."""
    arguments = _parser().parse_args(argv)
    training, cases = quick() if arguments.quick else (Training(), full())
    if arguments.only:
        cases = _chosen(cases, arguments.only)
    out: Path = arguments.out
    out.parent.mkdir(parents=True, exist_ok=True)
    print(header(), flush=True)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="weights-", dir=out.parent) as folder:
        bench = _Bench(Path(folder), out.with_suffix(".log"))
        told = bench.train(training, cases)
        for case in cases:
            rows.append(bench.measure(case) | told.get(case.name, {}))
            print(line(rows[-1]), flush=True)
            out.write_text(json.dumps(rows, indent=2) + "\n")
    verdicts = judge(rows)
    print("\n".join(verdict.text for verdict in verdicts))
    failed = [row["case"] for row in rows if "error" in row]
    missed = sum(not verdict.ok for verdict in verdicts)
    print(f"{len(verdicts) - missed} limits hold, {missed} missed")
    if failed:
        print(f"NOT MEASURED: {', '.join(failed)}")
    print(out)
    return 1 if failed or (arguments.strict and missed) else 0


class _PartFailed(Exception):
    """One line: which part, and where the reason is."""


class _Bench:
    """Runs the parts of each case as processes, one at a time."""

    def __init__(self, folder: Path, log: Path) -> None:
        self._folder = folder
        self._log = log
        log.write_text("")

    def train(self, training: Training, cases: Sequence[Case]) -> dict[str, dict[str, Any]]:
        """Write the versions of the trained cases; return what is told of each."""
        trained = [asdict(case) for case in cases if case.is_trained]
        if not trained:
            return {}
        job = {"training": asdict(training), "cases": trained, "folder": str(self._folder)}
        try:
            result = self._part("training", job)
        except _PartFailed as failure:
            print(failure)  # each of its cases will say that it has no versions
            return {}
        print(f"# {len(trained)} cases trained in {result['seconds']:.0f} s", flush=True)
        return result["told"]

    def measure(self, case: Case) -> dict[str, Any]:
        """Return a case's row."""
        load, started = OtherLoad(), time.perf_counter()
        row: dict[str, Any] = {
            "case": case.name,
            "dtype": case.dtype,
            "lr": case.lr,
            "steps_per_version": case.steps_per_version,
        }
        job = {"case": asdict(case), "folder": str(self._folder)}
        try:
            row |= self._part("codec", job)
            row |= self._publication(case, job)
        except _PartFailed as failure:
            row["error"] = str(failure)
        row |= {"others_cpu_ratio": load.ratio(), "seconds": time.perf_counter() - started}
        return row

    def _publication(self, case: Case, job: Mapping[str, Any]) -> dict[str, Any]:
        row: dict[str, Any] = {"resyncs": 0}
        followers: dict[str, int] = {}
        publishers: dict[str, int] = {}
        for place in case.joins:
            with tempfile.TemporaryDirectory(prefix=f"{place}-", dir=self._folder) as work:
                fields = self._part("bus", {**job, "place": place, "work": work})
            followers[place] = fields.pop("peak_rss_bytes")
            publishers[place] = fields.pop("publisher_peak_rss_bytes")
            row |= fields | {"resyncs": row["resyncs"] + fields["resyncs"]}
        row["peak_rss_bytes"] = max(followers.values())
        row["peak_rss_bytes_by_join"] = followers
        row["publisher_peak_rss_bytes"] = max(publishers.values())
        return row

    def _part(self, name: str, job: Mapping[str, Any]) -> dict[str, Any]:
        """Run `bench_weights_<name>`; return its result.

        Raises:
            _PartFailed: its reason is in the log.
        """
        command = [sys.executable, "-m", f"shared.cli.bench_weights_{name}", json.dumps(job)]
        with self._log.open("ab") as errors:
            try:
                done = subprocess.run(
                    command,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    env=child_environment(os.environ),
                    timeout=PART_WITHIN_S,
                    check=False,
                )
            except subprocess.TimeoutExpired:
                raise _PartFailed(
                    f"{name}: no end after {PART_WITHIN_S:g} s, see {self._log}"
                ) from None
        if done.returncode:
            raise _PartFailed(f"{name}: exit code {done.returncode}, see {self._log}")
        return json.loads(done.stdout)


def _chosen(cases: Sequence[Case], names: Sequence[str]) -> list[Case]:
    known = {case.name: case for case in cases}
    unknown = [name for name in names if name not in known]
    if unknown:
        _parser().error(f"no case {unknown[0]!r}: there are {', '.join(known)}")
    return [known[name] for name in known if name in names]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m shared.cli.bench_weights")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/weights.json"))
    parser.add_argument("--only", action="append", metavar="CASE", help="repeatable")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: figures mean nothing")
    parser.add_argument("--strict", action="store_true", help="exit code 1 on a missed limit")
    return parser


if __name__ == "__main__":
    sys.exit(main())
