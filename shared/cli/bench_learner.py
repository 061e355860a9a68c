"""`make bench-learner`: the learner's step against others', a table, `runs/bench/learner.json`.

Every contender is a process with one thread that holds its model and takes the same optimizer step
on the same sequences. They step in turn, so that whatever else the machine does meets all alike;
medians of CPU seconds are compared. Memory and the stall of a checkpoint have processes of their
own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

from shared.cli.bench_learner_cases import QUICK, SIZES, Lengths, Row, Size, judge
from shared.cli.bench_learner_data import Sequences, draw
from shared.cli.bench_learner_process import ContenderFailed, Process
from shared.cli.bench_learner_worker import CONTENDERS
from shared.cli.bench_weights_load import OtherLoad
from shared.cli.processes import child_environment

PART_WITHIN_S = 600.0


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; 1 where something could not be, or with --strict where a limit is missed."""
    arguments = _parser().parse_args(argv)
    sizes = QUICK if arguments.quick else SIZES
    if arguments.only:
        sizes = tuple(size for size in sizes if size.name in arguments.only)
    out: Path = arguments.out
    out.parent.mkdir(parents=True, exist_ok=True)
    bench = _Bench(out.with_suffix(".log"), arguments.trl_python)
    rows: list[Row] = []

    def keep(row: Row) -> None:
        rows.append(row)
        print(_line(row), flush=True)
        out.write_text(json.dumps(rows, indent=2) + "\n")

    with tempfile.TemporaryDirectory(prefix="bench-learner-") as folder:
        for size in sizes:
            prepared = bench.prepare(size, Path(folder))
            for lengths in get_args(Lengths):
                keep(bench.speed(size, lengths, prepared))
            keep(bench.checkpoint(size, prepared))
        if not arguments.quick:
            keep(bench.head())
    verdicts = judge(rows)
    print("\n".join(verdict.line for verdict in verdicts))
    missed = sum(not verdict.ok for verdict in verdicts)
    failed = [row["failed"] for row in rows if row.get("failed")]
    print(f"{len(verdicts) - missed} limits hold, {missed} missed")
    for reasons in failed:
        print(f"NOT MEASURED: {'; '.join(reasons)}")
    print(out)
    return 1 if failed or (arguments.strict and missed) else 0


class _Bench:
    def __init__(self, log: Path, trl_python: str) -> None:
        self._log = log
        self._trl_python = trl_python
        log.write_text("")

    def prepare(self, size: Size, folder: Path) -> Path:
        """Write a model and its data into a folder of their own; return it."""
        place = folder / size.name
        place.mkdir()
        for lengths in get_args(Lengths):
            draw(size.lengths(lengths), size.vocab).save(place / f"{lengths}.npz")
        told = self._part("prepare", json.dumps(size.config), str(place))
        (place / "facts.json").write_text(json.dumps(told))
        return place

    def speed(self, size: Size, lengths: Lengths, place: Path) -> Row:
        """Return one row of steps; the first of each contender is not counted."""
        load, failed, data = OtherLoad(), list[str](), place / f"{lengths}.npz"
        taken: dict[str, list[dict[str, Any]]] = {}
        with ExitStack() as stack:
            running: list[Process] = []
            for name in CONTENDERS:
                if name in size.left_out:
                    continue
                if why := self._missing(name):
                    failed.append(why)
                    continue
                python = self._trl_python if name == "trl" else sys.executable
                process = Process(python, name, place / "model", data, size.micro_tokens, self._log)
                running.append(stack.enter_context(process))
            for repetition in range(-1, size.repetitions):
                # each goes first in turn
                turn = repetition % len(running) if running else 0
                for process in [*running[turn:], *running[:turn]]:
                    try:
                        if repetition < 0:
                            process.wait_loaded()
                        answer = process.step(give_back=size.give_back)
                    except ContenderFailed as failure:
                        failed.append(str(failure))
                        running = [other for other in running if other is not process]
                        continue
                    if repetition >= 0:
                        taken.setdefault(process.name, []).append(answer)
        held = Sequences.load(data)
        return {
            "kind": "speed",
            "size": size.name,
            "parameters": json.loads((place / "facts.json").read_text())["parameters"],
            "lengths": lengths,
            "tokens": held.num_tokens,
            "loss_tokens": held.num_loss_tokens,
            "longest": max(len(ids) for ids in held.token_ids),
            "cpu_s": _medians(taken, "cpu_s"),
            "wall_s": _medians(taken, "wall_s"),
            "grad_norms": {name: answers[-1]["grad_norm"] for name, answers in taken.items()},
            "peak_bytes": {name: answers[-1]["peak_bytes"] for name, answers in taken.items()},
            "repetitions": {n: [a["cpu_s"] for a in answers] for n, answers in taken.items()},
            "others_cpu_ratio": load.ratio(),
            "left_out": list(size.left_out),
            "failed": failed,
        }

    def checkpoint(self, size: Size, place: Path) -> Row:
        """Return how long a checkpoint holds up training."""
        told = self._part(
            "checkpoint", str(place / "model"), str(place / "equal.npz"),
            str(size.micro_tokens), str(place / "checkpoint"),
        )  # fmt: skip
        return {"kind": "checkpoint", "size": size.name, **told}

    def head(self) -> Row:
        """Return the peak extra memory of log-probs and entropies, both ways."""
        full, chunked = (self._part("head", path) for path in ("full", "chunked"))
        return {
            "kind": "head",
            "full_bytes": full["extra_bytes"],
            "chunked_bytes": chunked["extra_bytes"],
            "logits_bytes": full["logits_bytes"],
        }

    def _missing(self, name: str) -> str:
        if name == "megatron" and find_spec("megatron") is None:
            return "megatron: needs the extra megatron"
        if name == "trl" and not Path(self._trl_python).exists():
            return f"trl: no {self._trl_python}, see `make bench-learner`"
        return ""

    def _part(self, name: str, *arguments: str) -> dict[str, Any]:
        with self._log.open("ab") as errors:
            try:
                done = subprocess.run(
                    [sys.executable, "-m", f"shared.cli.bench_learner_{name}", *arguments],
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    env=child_environment(os.environ),
                    timeout=PART_WITHIN_S,
                    check=False,
                )
            except subprocess.TimeoutExpired as error:
                raise SystemExit(
                    f"bench_learner_{name}: no end after {PART_WITHIN_S:g} s, see {self._log}"
                ) from error
        if done.returncode:
            raise SystemExit(f"bench_learner_{name} failed, see {self._log}")
        return json.loads(done.stdout)


def _medians(taken: dict[str, list[dict[str, Any]]], field: str) -> dict[str, float]:
    return {n: statistics.median(a[field] for a in answers) for n, answers in taken.items()}


def _line(row: Row) -> str:
    if row["kind"] == "checkpoint":
        return (
            f"{row['size']:<6} checkpoint   stall {row['stall_s']:.3f} s, on disk after "
            f"{row['write_s']:.3f} s, {row['checkpoint_bytes'] / 1e6:,.0f} MB (copied in memory: "
            f"{row['copy_s']:.3f} s; a step: {row['step_s']:.2f} s)"
        )
    if row["kind"] == "head":
        mib = {name: row[f"{name}_bytes"] / 2**20 for name in ("full", "chunked", "logits")}
        return (
            f"log-probs and entropies, peak extra memory: {mib['chunked']:,.0f} MiB, with full "
            f"logits {mib['full']:,.0f} MiB (one tensor of logits: {mib['logits']:,.0f} MiB)"
        )
    lines = [
        f"{row['size']:<6} {row['lengths']:<12} {row['parameters'] / 1e6:.1f} M, {row['tokens']:,} "
        f"tokens, longest {row['longest']}, others {row['others_cpu_ratio']:.2f}"
    ]
    ours = row["cpu_s"].get("ours")
    for name, seconds in row["cpu_s"].items():
        ratio = f"{seconds / ours:5.2f}x" if ours else "    -"
        lines.append(
            f"       {name:<16} {row['tokens'] / seconds:9,.0f} tokens/s  {seconds:8.3f} CPU s "
            f"(wall {row['wall_s'][name]:8.3f})  {ratio}  peak "
            f"{row['peak_bytes'][name] / 2**20:6,.0f} MiB"
        )
    plain = row["cpu_s"].get("ours_plain_loss")
    if ours and plain:
        lines.append(f"       loss and diagnostics: {max(0.0, 1 - plain / ours):.1%} of our step")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench_learner", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/learner.json"))
    parser.add_argument("--trl-python", default=".venv-trl/bin/python")
    parser.add_argument("--only", nargs="*", help="sizes")
    parser.add_argument("--quick", action="store_true", help="a size that does not count")
    parser.add_argument("--strict", action="store_true", help="exit code 1 for a missed limit")
    return parser


if __name__ == "__main__":
    sys.exit(main())
