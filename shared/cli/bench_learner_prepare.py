"""Writes a model of `make bench-learner` and scores its data: `…_prepare CONFIG FOLDER`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from shared.cli.bench_learner_data import Sequences
from shared.cli.bench_learner_hf import write_model
from shared.cli.bench_learner_ours import score

if __name__ == "__main__":
    torch.set_num_threads(1)
    config, place = json.loads(sys.argv[1]), Path(sys.argv[2])
    parameters = write_model(config, place / "model")
    for file in place.glob("*.npz"):
        score(place / "model", Sequences.load(file)).save(file)
    print(json.dumps({"parameters": parameters}))
