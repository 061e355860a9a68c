"""Asynchronous against synchronous training on the same engine: part of `make bench-rollout`.

Both are this product: `lagwise up` with one vLLM rollout, one learner, the same model, batch and
task; synchronous is `admission.max_staleness: 0`. Lengths come from what the engine samples
(services/env_agents/tasks/long_tail.py); nothing sleeps. The number of episodes in play is tuned
for each side. The ideal gain is computed from the lengths, the bare engine's speed measured in the
same run, and the synchronous run's training seconds (bench_async_ideal.py). The engine has a core
of its own on both sides (bench_cores.py).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors.torch import save_file

from shared.cli.bench_async_ideal import Engine, ideal_gain
from shared.cli.bench_cores import engine_apart
from shared.cli.bench_random_weights import random_weights
from shared.cli.records import load
from shared.runtime.errors import ConfigError
from shared.wire.telemetry import StepReport

SLOTS = 8
TURN_TOKENS, MEAN_TOKENS, CONTEXT = 64, 128, 1152
GROUPS, GROUP_SIZE = 8, 8
TUNED_AT = 4
"""Tail ratio at which the number of episodes in play is chosen."""
IN_PLAY = {"synchronous": (SLOTS + 2, GROUPS * GROUP_SIZE), "asynchronous": (SLOTS + 2, 3 * SLOTS)}
STALENESS = {"synchronous": 0, "asynchronous": 2}
SKIPPED = 2
"""Versions until a run is in its stride."""
ORDERS = 2
"""In which the episodes of a version are imagined to begin, for the ideal."""
LIMIT = 0.8

MODEL: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 32,
    "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 8,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64,
    "max_position_embeddings": CONTEXT, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}  # fmt: skip
"""0.5 M parameters, deep and narrow: sampling takes most of a version, as with large models, and
everything but the engine fits on the other core."""


@dataclass(frozen=True)
class Side:
    """What one run trained, from its first version in stride to its last."""

    tokens_per_s: float
    train_s: float
    """Median seconds of scoring, training and publishing a version."""
    batches: list[list[int]]
    """Sampled tokens by episode, of each version."""
    rewards: list[tuple[float, float]]
    """(seconds since the first training tokens were asked for, mean reward) by version."""
    staleness: float


def side_of(reports: Sequence[StepReport], started_at: float) -> Side:
    """Read one side off a run's step reports.

    Raises:
        ValueError: too few versions.
    """
    if len(reports) < SKIPPED + 2:
        raise ValueError(f"{len(reports)} versions are too few")
    counted = reports[SKIPPED:]
    batches = [r.arrays["trained_lengths"].numpy().astype(int).tolist() for r in counted]
    spent = counted[-1].published_at - reports[SKIPPED - 1].published_at
    return Side(
        tokens_per_s=sum(sum(batch) for batch in batches) / spent,
        train_s=statistics.median(r.published_at - r.started_at for r in counted),
        batches=batches,
        rewards=[(r.started_at - started_at, r.scalars["reward_mean"]) for r in reports],
        staleness=statistics.mean(r.scalars.get("staleness_mean", 0.0) for r in counted),
    )


def reward_at(side: Side, at_s: float) -> float:
    """Mean reward of the newest batch begun by then."""
    return [reward for at, reward in side.rewards if at <= at_s][-1]


def compare(sync: Side, asynchronous: Side, engine: Engine, in_play: int) -> dict[str, Any]:
    """Return one row of the table."""
    random = np.random.default_rng(0)
    played = [*sync.batches, *asynchronous.batches] * ORDERS
    batches = [random.permutation(batch).tolist() for batch in played]
    gain = asynchronous.tokens_per_s / sync.tokens_per_s
    ideal = ideal_gain(batches, engine, in_play, sync.train_s)
    end = min(sync.rewards[-1][0], asynchronous.rewards[-1][0])
    risen = {
        name: reward_at(side, end) - side.rewards[0][1]
        for name, side in (("synchronous", sync), ("asynchronous", asynchronous))
    }
    return {
        "synchronous_tokens_per_s": sync.tokens_per_s,
        "asynchronous_tokens_per_s": asynchronous.tokens_per_s,
        "gain": gain,
        "ideal_gain": ideal,
        "share": gain / ideal,
        "train_s": sync.train_s,
        "asynchronous_staleness": asynchronous.staleness,
        "synchronous_reward_per_s": risen["synchronous"] / end,
        "asynchronous_reward_per_s": risen["asynchronous"] / end,
    }


def make_model(folder: Path) -> None:
    """Write the config and random weights."""
    from services.rollout.vllm_options import published_shapes

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(MODEL))
    state = random_weights(published_shapes(MODEL), 0.05)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def values(
    model: Path, side: str, tail_ratio: float, in_play: int, versions: int
) -> dict[str, Any]:
    """Return the values file of one run."""
    task = "services.env_agents.tasks.long_tail"
    return {
        "learner": {"replicas": 1},
        "rollout": {"replicas": 1},
        "env_agents": {"replicas": 1},
        "logit_oracle": {"replicas": 0},
        "config": {
            "run": {"name": "long-tail", "seed": 0},
            "model": {"source": str(model), "dtype": "float32"},
            "task": {
                "dataset": "long_tail",
                "environment": f"{task}:LongTail",
                "renderer": f"{task}:Letters",
                "options": {
                    "mean_tokens": MEAN_TOKENS,
                    "tail_ratio": tail_ratio,
                    "turn_tokens": TURN_TOKENS,
                },
                "max_turns": CONTEXT // TURN_TOKENS,
            },
            "sampling": {"max_new_tokens": TURN_TOKENS, "context_tokens": CONTEXT},
            "admission": {
                "groups_per_version": GROUPS,
                "group_size": GROUP_SIZE,
                "max_staleness": STALENESS[side],
            },
            # Scored by the learner itself: on two cores an oracle would be a third device.
            "old_logprobs": {"route": "snapshot_old", "shadow": []},
            "learner": {
                "versions": versions,
                "optimizer": {"lr": 5e-4},
                "algo": {"objective": {"kind": "ppo", "low": 0.5, "high": 0.5, "dual": 3.0}},
                "eval": {"episodes": 0},
                "checkpoint": {"every_versions": 1000},
            },
            "rollout": {
                "engine": "vllm",
                "dtype": "float32",
                "max_running": SLOTS,
                "max_concurrency": 4096,
                "max_waiting": 4096,
                "step_tokens": 1024,
                "vllm": {"kv_cache_bytes": 1 << 29},
            },
            "env_agents": {"concurrency": in_play},
        },
    }


def play(folder: Path, written: dict[str, Any]) -> Side:
    """Run once, to the end.

    Raises:
        ConfigError: it did not end well; names its log.
    """
    folder.mkdir(parents=True)
    config, log = folder / "values.yaml", folder / "out.log"
    config.write_text(yaml.safe_dump(written))
    arguments = ["up", "--config", str(config), "--run-dir", str(folder / "run")]
    with log.open("w") as out:
        code = subprocess.call(
            [sys.executable, "-m", "shared.cli.main", *arguments], stdout=out, stderr=out
        )
    if code:
        raise ConfigError(f"{folder}: the run ended with exit code {code}; see {log}")
    records = load(folder / "run")
    started = min(at for at, _ in records.journal)
    return side_of([records.steps[v] for v in sorted(records.steps)], started)


def engine_of(model: Path) -> Engine:
    """Measure the bare engine; in vLLM's environment."""
    counts = (1, 2, 4, SLOTS)
    done = subprocess.run(
        [
            os.environ["LAGWISE_ROLLOUT_PYTHON"], "-m", "shared.cli.bench_curve", str(model),
            "--max-running", str(SLOTS), "--turn-tokens", str(TURN_TOKENS),
            "--context", str(CONTEXT), "--concurrent", *map(str, counts),
        ],
        check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    rates = json.loads(done.stdout.splitlines()[-1])
    return Engine({int(count): float(rate) for count, rate in rates.items()}, SLOTS)


def measure(
    model: Path, folder: Path, ratios: Sequence[float], versions: int
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Play all runs; return the rows, and the episodes in play by side."""
    in_play = {side: choices[-1] for side, choices in IN_PLAY.items()}
    rows: list[dict[str, Any]] = []
    for ratio in sorted(ratios, key=lambda r: r != TUNED_AT):
        sides: dict[str, Side] = {}
        engine = engine_of(model)  # each time: a machine is not always as fast as before
        print("bare engine, tokens/s by episodes at once:", engine.rates, flush=True)
        for side, choices in IN_PLAY.items():
            tried = choices if ratio == TUNED_AT else (in_play[side],)
            for count in tried:
                written = values(model.absolute(), side, ratio, count, versions)
                found = play(folder / f"{side}-{ratio:g}-{count}", written)
                print(f"  {side} ratio {ratio:g}, {count} in play: {found.tokens_per_s:.0f}")
                if side not in sides or found.tokens_per_s > sides[side].tokens_per_s:
                    sides[side], in_play[side] = found, count
        row = compare(sides["synchronous"], sides["asynchronous"], engine, in_play["synchronous"])
        rows.append({"tail_ratio": ratio, "engine_tokens_per_s": engine.rates, **row})
        print(line(rows[-1]), flush=True)
    return rows, in_play


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, add to the report, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--ratios", nargs="+", type=float, default=[4, 1, 2, 8])
    parser.add_argument("--versions", type=int, default=12)
    parser.add_argument("--folder", type=Path, default=Path("runs/bench/async"))
    parser.add_argument("--out", type=Path, default=Path("runs/bench/rollout.json"))
    arguments = parser.parse_args(argv)
    number = 1 + max((int(p.name) for p in arguments.folder.glob("[0-9]*")), default=0)
    folder = arguments.folder / str(number)
    model = folder / "model"
    make_model(model)
    with engine_apart():
        rows, in_play = measure(model, folder, arguments.ratios, arguments.versions)
    report = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    report["asynchronous_over_synchronous"] = {
        "in_play": in_play,
        "versions": arguments.versions,
        "load": os.getloadavg(),
        "rows": sorted(rows, key=lambda row: row["tail_ratio"]),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=2) + "\n")
    print(arguments.out)
    return 0


def line(row: dict[str, Any]) -> str:
    """Return one row as a line."""
    verdict = "ok    " if row["share"] >= LIMIT else "MISSED"
    return (
        f"{verdict} tail ratio {row['tail_ratio']:g}: asynchronous "
        f"{row['asynchronous_tokens_per_s']:.0f} tokens/s, synchronous "
        f"{row['synchronous_tokens_per_s']:.0f}: gain {row['gain']:.2f} of {row['ideal_gain']:.2f}"
        f" possible, share {row['share']:.2f} (limit {LIMIT}); reward per 100 s "
        f"{100 * row['asynchronous_reward_per_s']:+.2f} against "
        f"{100 * row['synchronous_reward_per_s']:+.2f}; mean staleness "
        f"{row['asynchronous_staleness']:.2f}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
