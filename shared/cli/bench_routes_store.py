"""Finished cells as JSON lines, so that a long run can stop anywhere and go on; and the workers."""

from __future__ import annotations

import asyncio
import hashlib
import json
import multiprocessing
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shared.cli.bench_routes_cells import Cell, Size, cell_of

Row = Mapping[str, Any]


class Store:
    """Rows by key; only those of one size count."""

    def __init__(self, path: Path, size: Size) -> None:
        self.path = path
        self.size = size
        self._rows: dict[str, Row] = {}
        if path.is_file():
            for line in path.read_text().splitlines():
                try:
                    row = json.loads(line)
                except ValueError:
                    continue  # the run was killed while it wrote this line
                self._rows[row["size"] + row["key"]] = row

    def get(self, cell: Cell, size: Size | None = None) -> Row | None:
        """Return a cell's result."""
        return self._rows.get(_digest(size or self.size) + cell.key)

    def found(self, cells: Iterable[Cell]) -> dict[Cell, Row]:
        """Return the cells that are done."""
        rows = {cell: self.get(cell) for cell in cells}
        return {cell: row for cell, row in rows.items() if row is not None}

    def add(self, row: Row, size: Size) -> None:
        row = {**row, "size": _digest(size)}
        self._rows[row["size"] + row["key"]] = row
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def _digest(size: Size) -> str:
    return hashlib.blake2b(repr(size).encode(), digest_size=4).hexdigest()


def run_cell(facts: dict[str, Any], size: dict[str, Any], bases: str) -> dict[str, Any]:
    """Run one cell in this process."""
    import gc

    import torch

    from shared.cli.bench_routes_run import Run

    torch.set_num_threads(1)
    gc.freeze()  # what the imports made is not looked through again: a tenth of a run
    return asyncio.run(Run(cell_of(facts), Size(**size), Path(bases)).run())


def run_missing(
    cells: Sequence[Cell],
    store: Store,
    bases: Path,
    *,
    size: Size | None = None,
    jobs: int = 1,
    until: float = float("inf"),
    tell: Callable[[int, int, Row], None],
) -> int:
    """Run what is not in the store; return how many cells are still missing.

    Args:
        cells: in the order in which they are run; equal ones once.
        store: where finished cells go.
        bases: folder of base policies.
        size: other than the store's.
        jobs: processes; 0: in this one.
        until: `time.monotonic()` after which no cell is begun.
        tell: called with (finished, to do, row) after each.
    """
    size = size or store.size
    missing = {cell.key: cell for cell in cells if store.get(cell, size) is None}
    todo = list(missing.values())
    finished = 0

    def take(row: Row) -> None:
        nonlocal finished
        store.add(row, size)
        finished += 1
        tell(finished, len(todo), row)

    if not jobs:
        for cell in todo:
            if time.monotonic() >= until:
                break
            take(run_cell(asdict(cell), asdict(size), str(bases)))
        return len(todo) - finished
    context = multiprocessing.get_context("spawn")
    waiting = iter(todo)
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        running: set[Future[dict[str, Any]]] = set()
        while True:
            while len(running) < jobs and time.monotonic() < until:
                cell = next(waiting, None)
                if cell is None:
                    break
                running.add(pool.submit(run_cell, asdict(cell), asdict(size), str(bases)))
            if not running:
                return len(todo) - finished
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                take(future.result())
