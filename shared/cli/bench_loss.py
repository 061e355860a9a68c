"""`make bench-loss`: what loss and diagnostics cost in a training step, and `runs/bench/loss.json`.

One process, one core. A random Qwen3 of 18 M parameters takes the learner's own optimizer steps on
multi-turn sequences of mixed versions. Of every step, everything but the model is attributed to
loss and diagnostics: laying out the batch, the loss and its gradient down to the log-probs, the
report, guards, metrics, and the encoded step report. Both parts come from the same step, so that
their ratio needs no quiet machine; CPU seconds are counted beside wall seconds.

Shapes: T tokens of a micro-batch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from services.learner.config import LearnerConfig
from services.learner.items import BatchItems, Item, pack_items
from services.learner.step_report import step_report
from services.learner.step_telemetry import StepTelemetry
from services.learner.trainer import Trainer
from shared.algo.batching import PackedBatch
from shared.backends.base import ForwardOutput, LossFn
from shared.backends.torch_backend import TorchBackend
from shared.cli.bench_weights_load import OtherLoad
from shared.runtime.context import Context
from shared.runtime.logs import Log
from shared.runtime.memory_bus import MemoryBus
from shared.runtime.memory_server import MemoryServer
from shared.wire.codec import encode
from shared.wire.journal import Batch
from shared.wire.subjects import Subjects

LIMIT = 0.05
"""Of the CPU seconds of a training step, at least `MIN_PARAMETERS` and `MIN_TOKENS`."""
MIN_PARAMETERS, MIN_TOKENS = 17e6, 4000
VERSION = 8
"""That the steps start from; stamps lie up to four below."""


@dataclass(frozen=True, slots=True)
class Size:
    """Of model and batch."""

    hidden: int = 384
    layers: int = 8
    vocab: int = 8192
    sequences: int = 16
    turns: int = 8
    """Each of `turn_tokens` tokens, of which two thirds are sampled."""
    turn_tokens: int = 36


SMALL = Size(hidden=32, layers=1, vocab=64, sequences=4, turns=3, turn_tokens=9)
"""For the test of the command: the ratio of a model this small says nothing."""

CASES: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    "two_minibatches": {"optimizer": {"minibatches": 2}, "algo": {"entropy_bonus": 0.01}},
    "every_unit": {
        "algo": {
            "corrections": [
                {"kind": "segment_tis"},
                {"kind": "self_normalise"},
                {"kind": "token_mask"},
                {"kind": "seq_geo_mask"},
                {"kind": "segment_mask"},
                {"kind": "kl_mask"},
                {"kind": "veto"},
            ],
            "objective": {"kind": "opsm"},
            "kl": {"coefficient": 0.001},
            "aggregation": "seq_mean_token_mean",
        }
    },
}
"""Learner sections: the defaults, with entropies in two steps, and corrections of every unit."""


@dataclass
class Clock:
    """Seconds inside the model, and inside the loss that it calls."""

    wall_s: float = 0.0
    cpu_s: float = 0.0

    def add(self, since: tuple[float, float], sign: int = 1) -> None:
        wall, cpu = now()
        self.wall_s += sign * (wall - since[0])
        self.cpu_s += sign * (cpu - since[1])


def now() -> tuple[float, float]:
    """Return wall and CPU seconds of this process."""
    return time.perf_counter(), time.process_time()


class TimedBackend(TorchBackend):
    """The backend, counting its own time without that of the loss."""

    def __init__(self) -> None:
        super().__init__(torch.float32)
        self.model = Clock()

    def forward_backward(
        self, batch: PackedBatch, loss_fn: LossFn, *, temperature: float, with_entropy: bool
    ) -> float:
        """As `TorchBackend`, the loss differentiated apart: same gradients, counted elsewhere."""

        def apart(output: ForwardOutput, here: PackedBatch) -> torch.Tensor:
            since = now()
            logprobs_T = output.logprobs_T.detach().requires_grad_()
            entropy_T = output.entropy_T
            if entropy_T is not None:
                entropy_T = entropy_T.detach().requires_grad_()
            leaf = replace(output, logprobs_T=logprobs_T, entropy_T=entropy_T)
            loss_fn(leaf, here).backward()
            self.model.add(since, -1)
            assert logprobs_T.grad is not None, "a batch without loss tokens"
            total = (output.logprobs_T * logprobs_T.grad).sum()
            if output.entropy_T is None or entropy_T is None or entropy_T.grad is None:
                return total
            return total + (output.entropy_T * entropy_T.grad).sum()

        since = now()
        loss = super().forward_backward(
            batch, apart, temperature=temperature, with_entropy=with_entropy
        )
        self.model.add(since)
        return loss

    def step(self, lr: float, *, max_grad_norm: float) -> float:
        """As `TorchBackend`."""
        since = now()
        norm = super().step(lr, max_grad_norm=max_grad_norm)
        self.model.add(since)
        return norm


def config_of(name: str, *, lr: float) -> LearnerConfig:
    """Return a case's configuration."""
    optimizer = {**CASES[name].get("optimizer", {}), "lr": lr}
    return LearnerConfig.model_validate({"learner": {**CASES[name], "optimizer": optimizer}})


def write_model(size: Size, path: Path) -> None:
    """Write a random Qwen3 of that size."""
    from transformers import Qwen3Config, Qwen3ForCausalLM  # seconds

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=size.vocab,
        hidden_size=size.hidden,
        intermediate_size=size.hidden * 13 // 4,
        num_hidden_layers=size.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=size.hidden // 8,
        max_position_embeddings=size.turns * size.turn_tokens,
        tie_word_embeddings=True,
    )
    Qwen3ForCausalLM(config).save_pretrained(path)


def make_batch(size: Size, backend: TorchBackend) -> BatchItems:
    """Draw multi-turn sequences; versions change at turns and inside them."""
    rng = np.random.default_rng(0)
    length = size.turns * size.turn_tokens
    in_turn = np.arange(length) % size.turn_tokens
    mask = in_turn >= size.turn_tokens // 3
    items: list[Item] = []
    for number in range(size.sequences):
        steps = (rng.random(length) < 2.0 / length).cumsum()
        versions = np.where(mask, np.minimum(VERSION, VERSION - 4 + number % 4 + steps), -1)
        zeros = np.zeros(length, np.float32)
        item = Item(
            token_ids=rng.integers(0, size.vocab, length, dtype=np.int32),
            loss_mask=mask,
            sampled_mask=mask,
            versions=versions.astype(np.int64),
            old_logprobs=zeros,
            sampler_logprobs=zeros,
            advantages=np.full(length, rng.normal(), np.float32),
            reward=float(number % 2),
            trajectory=number,
            reference_logprobs=zeros,
        )
        current = backend.score(pack_items([item]), temperature=1.0).numpy()
        stale = mask & (versions < VERSION)  # at age 0 the old log-prob is the current one
        old = (current + 0.1 * rng.normal(size=length) * stale).astype(np.float32)
        sampler = (old + 0.02 * rng.normal(size=length) * mask).astype(np.float32)
        items.append(
            replace(item, old_logprobs=old, sampler_logprobs=sampler, reference_logprobs=current)
        )
    ages = np.concatenate([VERSION - item.versions[item.loss_mask] for item in items])
    num = len(ages)
    return BatchItems(tuple(items), num, num, num, ages)


def measure(name: str, size: Size, model: Path, repetitions: int) -> dict[str, Any]:
    """Return one case's row."""
    config = config_of(name, lr=1e-12)  # repetitions start from the same version
    backend = TimedBackend()
    backend.load_hf(model)
    items = make_batch(size, backend)
    trainer = Trainer(backend, config.learner, temperature=1.0, num_ages=8)
    bus = MemoryBus(Subjects("bench-loss"), MemoryServer())
    telemetry = StepTelemetry(Context("learner", "learner-0", "i", bus, Log("bench")), config)
    batch = Batch(version=VERSION, epoch=0, seed=0, groups=())
    rows: list[dict[str, float]] = []
    load = OtherLoad()
    for _ in range(repetitions + 1):
        backend.model, since, whole = Clock(), now(), Clock()
        outcome = trainer.step(items, version=VERSION, seed=0)
        telemetry.judge(VERSION, outcome, [], 0)
        telemetry.show(outcome)
        encode(step_report(batch, [], outcome, None, (0.0, 0.0), dispatched_lengths=[], further={}))
        whole.add(since)
        rows.append(
            {
                "step_cpu_s": whole.cpu_s,
                "step_wall_s": whole.wall_s,
                "loss_cpu_s": whole.cpu_s - backend.model.cpu_s,
                "loss_wall_s": whole.wall_s - backend.model.wall_s,
            }
        )
    rows = rows[1:]  # the first allocates
    shares = [row["loss_cpu_s"] / row["step_cpu_s"] for row in rows]
    walls = [row["loss_wall_s"] / row["step_wall_s"] for row in rows]
    return {
        "case": name,
        "parameters": backend.num_parameters,
        "tokens": sum(item.num_tokens for item in items.items),
        "loss_tokens": len(items.ages),
        "loss_share": statistics.median(shares),
        "loss_share_max": max(shares),
        "loss_share_wall": statistics.median(walls),
        "step_s": statistics.median(row["step_cpu_s"] for row in rows),
        "loss_s": statistics.median(row["loss_cpu_s"] for row in rows),
        "others_cpu_ratio": load.ratio(),
        "repetitions": rows,
        "size": asdict(size),
    }


def line(row: Mapping[str, Any]) -> str:
    """Return a row as text."""
    return (
        f"{row['case']:<16} {row['parameters'] / 1e6:6.1f} M {row['tokens']:6d} tokens  "
        f"step {row['step_s']:7.3f} s  loss and diagnostics {row['loss_s']:7.4f} s  "
        f"{100 * row['loss_share']:5.2f} % (wall {100 * row['loss_share_wall']:5.2f} %, "
        f"highest {100 * row['loss_share_max']:5.2f} %, others {row['others_cpu_ratio']:.2f})"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; 1 where a median is above the limit or the size does not count."""
    parser = argparse.ArgumentParser(prog="bench_loss", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/loss.json"))
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--small", action="store_true", help="a size that does not count")
    arguments = parser.parse_args(argv)
    size = SMALL if arguments.small else Size()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="bench-loss-") as folder:
        write_model(size, Path(folder))
        for name in CASES:
            rows.append(measure(name, size, Path(folder), arguments.repetitions))
            print(line(rows[-1]), flush=True)
    out: Path = arguments.out
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(rows, indent=2) + "\n")
    print(out)
    if any(row["parameters"] < MIN_PARAMETERS or row["tokens"] < MIN_TOKENS for row in rows):
        print("not judged: too small a model or batch")
        return 0
    missed = [row["case"] for row in rows if row["loss_share"] > LIMIT]
    print(f"above {100 * LIMIT:.0f} %: {', '.join(missed) or 'none'}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
