"""How long a checkpoint holds up training: `bench_learner_checkpoint MODEL DATA TOKENS FOLDER`.

After two steps of the learner, so that the optimizer has its moments. Where the backend takes a
snapshot that is written later, the stall is the snapshot alone; otherwise it is all of `save`. A
copy of the same bytes in memory is timed beside it.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from shared.cli.bench_learner_data import Sequences
from shared.cli.bench_learner_ours import Learner

REPETITIONS = 3


def main(model: Path, data: Path, micro_tokens: int, folder: Path) -> dict[str, float]:
    """Return medians in seconds, and the checkpoint's bytes."""
    torch.set_num_threads(1)
    learner = Learner(model, Sequences.load(data), micro_tokens)
    steps = [_timed(learner.step) for _ in range(2)]
    stalls: list[float] = []
    writes: list[float] = []
    copies: list[float] = []
    num_bytes = 0
    for _ in range(REPETITIONS):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        stall_s, write_s = _save(learner.backend, folder)
        stalls.append(stall_s)
        writes.append(write_s)
        num_bytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        source = torch.zeros(num_bytes, dtype=torch.uint8)
        copies.append(_timed(source.clone))
    return {
        "step_s": steps[-1],
        "stall_s": median(stalls),
        "write_s": median(writes),
        "copy_s": median(copies),
        "checkpoint_bytes": num_bytes,
    }


def _save(backend: Any, folder: Path) -> tuple[float, float]:
    """Return the seconds that the caller waits, and those until all is written."""
    started = time.perf_counter()
    if hasattr(backend, "snapshot"):
        snapshot = backend.snapshot()
        stall_s = time.perf_counter() - started
        snapshot.write(folder)
        return stall_s, time.perf_counter() - started
    backend.save(folder)
    whole_s = time.perf_counter() - started
    return whole_s, whole_s


def _timed(act: Any) -> float:
    started = time.perf_counter()
    act()
    return time.perf_counter() - started


if __name__ == "__main__":
    _, model, data, micro_tokens, folder = sys.argv
    print(json.dumps(main(Path(model), Path(data), int(micro_tokens), Path(folder))))
