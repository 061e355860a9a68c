"""Our contenders of `make bench-learner`: the learner's own step, on either backend."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from services.learner.config import LearnerConfig
from services.learner.items import BatchItems, Item, pack_items
from services.learner.trainer import Trainer
from shared.algo.batching import PackedBatch, balance
from shared.backends.base import Backend, ForwardOutput
from shared.backends.torch_backend import TorchBackend
from shared.cli.bench_learner_data import Sequences
from shared.cli.bench_learner_worker import LEARNING_RATE

VERSION = 1


class Learner:
    """`Trainer.step`: packing, forward and backward, the default loss, its report, AdamW."""

    def __init__(self, model: Path, data: Sequences, micro_tokens: int) -> None:
        self.backend = self._open(model)
        config = LearnerConfig.model_validate(
            {"learner": {"optimizer": {"lr": LEARNING_RATE, "micro_batch_tokens": micro_tokens}}}
        )
        self._trainer = Trainer(self.backend, config.learner, temperature=1.0, num_ages=5)
        self._items = items_of(data)

    def _open(self, model: Path) -> Backend:
        backend = TorchBackend(torch.float32)
        backend.load_hf(model)
        return backend

    def step(self) -> float:
        outcome = self._trainer.step(self._items, version=VERSION, seed=0)
        return outcome.scalars["grad_norm"]


class PlainLoss:
    """The same packs and optimizer with the shortest loss there is: -Σ A·logp / count."""

    def __init__(self, model: Path, data: Sequences, micro_tokens: int) -> None:
        self._backend = TorchBackend(torch.float32)
        self._backend.load_hf(model)
        items = items_of(data).items
        packs = balance([item.num_tokens for item in items], micro_tokens)
        self._packs = [pack_items([items[index] for index in pack]) for pack in packs]
        self._count = data.num_loss_tokens

    def step(self) -> float:
        self._backend.accumulate(self._packs, self._loss, temperature=1.0, with_entropy=False)
        return self._backend.step(LEARNING_RATE, max_grad_norm=1.0)

    def _loss(self, output: ForwardOutput, batch: PackedBatch) -> torch.Tensor:
        return -(output.logprobs_T * batch.per_token["advantages"]).sum() / self._count


class Megatron(Learner):
    """The learner's step on the megatron backend, one rank."""

    def _open(self, model: Path) -> Backend:
        from shared.backends.megatron.backend import MegatronBackend

        store = Path(tempfile.mkdtemp(prefix="bench-learner-")) / "store"
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
        backend = MegatronBackend(torch.float32)
        backend.load_hf(model)
        return backend


def items_of(data: Sequences) -> BatchItems:
    """Return the sequences as the learner has them, all sampled by the current version."""
    items: list[Item] = []
    for number, (ids, prompt, advantage, old) in enumerate(
        zip(data.token_ids, data.prompts, data.advantages, data.old_logprobs, strict=True)
    ):
        mask = np.arange(len(ids)) >= prompt
        items.append(
            Item(
                token_ids=ids.astype(np.int32),
                loss_mask=mask,
                sampled_mask=mask,
                versions=np.where(mask, VERSION, -1),
                old_logprobs=old,
                sampler_logprobs=old,
                advantages=np.full(len(ids), advantage, np.float32),
                reward=float(number % 2),
                trajectory=number,
            )
        )
    count = data.num_loss_tokens
    return BatchItems(tuple(items), count, count, count, np.zeros(count, np.int64))


def score(model: Path, data: Sequences) -> Sequences:
    """Return the data with the model's own log-probs as the old ones."""
    backend = TorchBackend(torch.float32)
    backend.load_hf(model)
    rows = [
        backend.score(pack_items([item]), temperature=1.0).numpy().astype(np.float32)
        for item in items_of(data).items
    ]
    return data.with_old_logprobs(rows)
