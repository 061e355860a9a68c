"""Versions of a small transformer in real training, for `make bench-weights`.

A Qwen3 of 20 M parameters learns a Markov chain over its vocabulary, with the optimizer that the
learner uses: bf16 parameters over float32 masters. From the warmed-up state each learning rate
branches off, with its moments, settles, and then leaves its versions as files:
`<case>/<version>.safetensors`.

Shapes: B sequences of L tokens.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shared.backends.adamw import AdamWSettings, MasterAdamW
from shared.cli.bench_weights_cases import Case, Training

BATCH, LENGTH = 8, 32
SUCCESSORS = 4
"""Of each token in the chain, with probabilities 1/2, 1/4, 1/8, 1/8."""
MAX_GRAD_NORM = 1.0


class Trainer:
    """A model, its optimizer and its data."""

    def __init__(self, training: Training, seed: int = 0) -> None:
        from transformers import AutoModelForCausalLM, Qwen3Config  # seconds

        torch.manual_seed(seed)
        config = Qwen3Config(
            vocab_size=training.vocab,
            hidden_size=training.hidden,
            intermediate_size=training.hidden * 13 // 4,
            num_hidden_layers=training.layers,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=training.hidden // 8,
            max_position_embeddings=LENGTH,
            tie_word_embeddings=True,
        )
        self._model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        self._parameters: dict[str, torch.nn.Parameter] = dict(self._model.named_parameters())
        self._optimizer = MasterAdamW(self._parameters, AdamWSettings())
        self._rng = np.random.default_rng(seed)
        self._successors = self._rng.integers(0, training.vocab, (training.vocab, SUCCESSORS))

    def train(self, steps: int, lr: float) -> float:
        """Take optimizer steps; return the last one's loss, nats per token."""
        loss = float("nan")
        for _ in range(steps):
            tokens_BL = self._batch()
            output = self._model(input_ids=tokens_BL, labels=tokens_BL, use_cache=False)
            output.loss.backward()
            self._optimizer.step(lr, max_grad_norm=MAX_GRAD_NORM)
            loss = float(output.loss.detach())
        return loss

    def weights(self, dtype: str) -> dict[str, torch.Tensor]:
        """Return live views of the published weights: the parameters, or for F32 the masters."""
        if dtype == "BF16":
            return {name: p.detach() for name, p in self._parameters.items()}
        masters = self._optimizer.state()
        return {name: masters[f"master/{name}"] for name in self._parameters}

    def checkpoint(self) -> dict[str, torch.Tensor]:
        """Return a copy of masters and moments."""
        return {name: tensor.clone() for name, tensor in self._optimizer.state().items()}

    def restore(self, checkpoint: Mapping[str, torch.Tensor]) -> None:
        """Go back to a checkpoint."""
        self._optimizer.load_state(checkpoint.items())
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(checkpoint[f"master/{name}"])

    def _batch(self) -> torch.Tensor:
        tokens_BL = np.empty((BATCH, LENGTH), np.int64)
        tokens_BL[:, 0] = self._rng.integers(0, len(self._successors), BATCH)
        choices_BL = self._rng.choice(SUCCESSORS, (BATCH, LENGTH), p=[1 / 2, 1 / 4, 1 / 8, 1 / 8])
        for t in range(1, LENGTH):
            tokens_BL[:, t] = self._successors[tokens_BL[:, t - 1], choices_BL[:, t]]
        return torch.from_numpy(tokens_BL)


def train_cases(training: Training, cases: list[Case], folder: Path) -> dict[str, dict[str, float]]:
    """Write the versions of all trained cases; return what is told of each run, by case."""
    trainer = Trainer(training)
    first_loss = trainer.train(1, training.warmup_lr)
    trainer.train(training.warmup_steps - 1, training.warmup_lr)
    warm = trainer.checkpoint()
    told: dict[str, dict[str, float]] = {}
    for lr in sorted({case.lr for case in cases if case.lr is not None}):
        trainer.restore(warm)
        trainer.train(training.settling_steps, lr)
        branch = [case for case in cases if case.lr == lr]
        for steps in sorted({case.steps_per_version or 1 for case in branch}):
            publishing = [case for case in branch if case.steps_per_version == steps]
            loss = first_loss
            for version in range(training.versions + 1):
                if version:
                    loss = trainer.train(steps, lr)
                for case in publishing:
                    _save(trainer.weights(case.dtype), folder / case.name, version)
            for case in publishing:
                told[case.name] = {"loss_at_start": first_loss, "loss_at_end": loss}
    return told


def _save(weights: Mapping[str, torch.Tensor], folder: Path, version: int) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(weights), folder / f"{version:03d}.safetensors")


def main(argument: str) -> None:
    """Train for a JSON job and print a JSON object: what is told by case, and the seconds."""
    job = json.loads(argument)
    torch.set_num_threads(os.cpu_count() or 1)
    started = time.perf_counter()
    cases = [Case(**case) for case in job["cases"]]
    told = train_cases(Training(**job["training"]), cases, Path(job["folder"]))
    print(json.dumps({"told": told, "seconds": time.perf_counter() - started}))


if __name__ == "__main__":
    main(sys.argv[1])
