"""Draws tasks, seeded; whether one is held out is decided by its content.

    python -m services.env_agents.tasks.retail_tools.generator --out data/retail_tools

A task is drawn from blake2b(seed/index/attempt): domain, personality, database, wish. It belongs
to `eval` if and only if a digest of its *content* falls into the first fifth of the digests, else
to `train`; draws go on until the split is the one asked for. So no seed of one split ever meets a
task of the other.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from services.env_agents.tasks.retail_tools.airline import Airline
from services.env_agents.tasks.retail_tools.retail import Retail
from services.env_agents.tasks.retail_tools.scenario import PERSONALITIES, Domain, Scenario
from services.env_agents.tasks.retail_tools.telecom import Telecom

FULL: Mapping[str, Domain] = {d.name: d for d in (Retail(), Airline(), Telecom())}

DOMAINS: Mapping[str, Domain] = FULL | {
    "retail_small": Retail("retail_small", ("cancel", "return", "denied", "total"), id_digits=2)
}
"""With the reduced one, which is drawn only when it is named (examples/retail_tools)."""

EVAL_FIFTH = 2**64 // 5


@lru_cache(maxsize=2048)
def draw(
    split: str,
    seed: int,
    index: int,
    domains: Sequence[str] = tuple(FULL),
    personalities: Sequence[str] = PERSONALITIES,
) -> Scenario:
    """Draw the task `index` of a split; equal arguments give equal tasks."""
    attempt = 0
    while True:
        mixed = hashlib.blake2b(f"{seed}/{index}/{attempt}".encode(), digest_size=8).digest()
        rng = random.Random(int.from_bytes(mixed, "big"))
        name, personality = rng.choice(domains), rng.choice(personalities)
        database, want = DOMAINS[name].draw(rng, personality)
        scenario = Scenario(name, personality, database, want)
        if split_of(scenario) == split:
            return scenario
        attempt += 1


def split_of(scenario: Scenario) -> str:
    """The split that a task belongs to, from its content alone."""
    return "eval" if int(scenario.digest(), 16) < EVAL_FIFTH else "train"


def write(folder: Path, counts: Mapping[str, int], seed: int) -> None:
    """Write one JSON-lines file per split."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in counts.items():
        rows = (draw(split, seed, index).row() for index in range(count))
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=Path("data/retail_tools"))
    parser.add_argument("--train", type=int, default=2000)
    parser.add_argument("--eval", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write(arguments.out, {"train": arguments.train, "eval": arguments.eval}, arguments.seed)
