"""One contender of `make bench-learner` as a process: `…_worker NAME MODEL DATA TOKENS`.

Loads, says so, then takes one optimizer step per line of its input and answers with seconds of
wall and CPU time, the gradient norm, and the peak of its memory. torch on one thread.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Protocol, cast

from shared.cli.bench_learner_data import Sequences
from shared.cli.peak_memory import peak_rss_bytes

CONTENDERS = {
    "ours": "bench_learner_ours:Learner",
    "ours_plain_loss": "bench_learner_ours:PlainLoss",
    "megatron": "bench_learner_ours:Megatron",
    "hf_padded": "bench_learner_hf:Padded",
    "hf_flat": "bench_learner_hf:Flat",
    "hf_loop": "bench_learner_hf:Loop",
    "trl": "bench_learner_trl:Grpo",
}
"""Modules of `shared.cli`: those of `bench_learner_trl` run in TRL's environment."""

GIVE_BACK = "give back"
"""A line that says so has freed memory returned to the system after the step."""

LEARNING_RATE = 1e-12
"""Every step starts from the same weights, as good as."""


class Contender(Protocol):
    """A model with its optimizer."""

    def __init__(self, model: Path, data: Sequences, micro_tokens: int) -> None: ...

    def step(self) -> float:
        """Take one optimizer step on all of the data; return the gradient norm before clipping."""
        ...


def main(argv: Sequence[str]) -> None:
    """Serve until the input ends."""
    import torch

    torch.set_num_threads(1)
    name, model, data, micro_tokens = argv
    module, _, kind = CONTENDERS[name].partition(":")
    made = cast("type[Contender]", getattr(import_module(f"shared.cli.{module}"), kind))
    answers = sys.stdout
    sys.stdout = sys.stderr  # what libraries print is no answer
    contender = made(Path(model), Sequences.load(Path(data)), int(micro_tokens))
    loaded = peak_rss_bytes()
    answers.write(json.dumps({"ready": name}) + "\n")
    answers.flush()
    for line in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        norm = contender.step()
        answer = {
            "wall_s": time.perf_counter() - wall,
            "cpu_s": time.process_time() - cpu,
            "grad_norm": norm,
            "loaded_bytes": loaded,
            "peak_bytes": peak_rss_bytes(),
        }
        if line.strip() == GIVE_BACK:
            _give_back()
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _give_back() -> None:
    """Return freed memory to the system, where glibc is: others wait with their models loaded."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


if __name__ == "__main__":
    main(sys.argv[1:])
