"""TRL's contender of `make bench-learner`: GRPOTrainer on given completions, nothing generated.

Runs in TRL's environment. Timed: building the padded micro-batches, `GRPOTrainer.training_step`
for each (its forward, its loss with its metrics, backward), clipping, its optimizer's step. Not
timed: generation, rewards, the scoring of old log-probs. Sequences arrive in order, as many per
micro-batch as make one at their mean length; prompts are padded on the left and completions on the
right, as TRL does.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from shared.cli.bench_learner_data import Sequences
from shared.cli.bench_learner_worker import LEARNING_RATE


class Grpo:
    """GRPOTrainer with its default loss (dapo), no reference model, no gradient checkpointing."""

    def __init__(self, model: Path, data: Sequences, micro_tokens: int) -> None:
        from datasets import Dataset
        from tokenizers import Tokenizer, models
        from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
        from trl import GRPOConfig, GRPOTrainer

        self._data = data
        count = len(data.token_ids)
        self._size = max(1, round(micro_tokens * count / data.num_tokens))
        self._micros = -(-count // self._size)
        words = {"<pad>": 0, "<eos>": 1}
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<pad>")),
            pad_token="<pad>",
            eos_token="<eos>",
        )
        arguments = GRPOConfig(
            output_dir=tempfile.mkdtemp(prefix="bench-learner-"),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=self._size,
            gradient_accumulation_steps=self._micros,
            num_generations=self._size if self._size > 1 else 2,
            generation_batch_size=self._size * self._micros if self._size > 1 else 2,
            beta=0.0,
            learning_rate=LEARNING_RATE,
            adam_beta2=0.95,
            weight_decay=0.0,
            report_to=[],
        )
        trainer: Any = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(
                model, dtype=torch.float32, attn_implementation="sdpa"
            ),
            reward_funcs=lambda completions, **_: [0.0 for _ in completions],
            args=arguments,
            train_dataset=Dataset.from_dict({"prompt": ["a"] * max(8, count)}),
            processing_class=tokenizer,
        )
        trainer._prepare_inputs = lambda inputs: inputs  # ours, instead of generating
        trainer.current_gradient_accumulation_steps = self._micros
        trainer.create_optimizer()
        trainer.model, trainer.optimizer = trainer.accelerator.prepare(
            trainer.model, trainer.optimizer
        )
        self._trainer = trainer

    def step(self) -> float:
        trainer, count = self._trainer, len(self._data.token_ids)
        for start in range(0, count, self._size):
            batch = self._batch(range(start, min(start + self._size, count)))
            trainer.training_step(trainer.model, batch, batch["num_items_in_batch"])
        norm = trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), 1.0)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        return float(norm)

    def _batch(self, indices: range) -> dict[str, torch.Tensor]:
        data = self._data
        prompts, completions, old = [], [], []
        for i in indices:
            ids, cut = torch.from_numpy(data.token_ids[i]), data.prompts[i]
            prompts.append(ids[:cut])
            completions.append(ids[cut:])
            old.append(torch.from_numpy(data.old_logprobs[i])[cut:])

        def right(tensors: list[torch.Tensor]) -> torch.Tensor:
            return pad_sequence(tensors, batch_first=True)

        def left(tensors: list[torch.Tensor]) -> torch.Tensor:
            return pad_sequence(tensors, batch_first=True, padding_side="left")

        return {
            "prompt_ids": left(prompts),
            "prompt_mask": left([torch.ones_like(p) for p in prompts]),
            "completion_ids": right(completions),
            "completion_mask": right([torch.ones_like(c) for c in completions]),
            "advantages": torch.tensor([data.advantages[i] for i in indices]),
            "old_per_token_logps": right(old),
            "num_items_in_batch": torch.tensor(float(data.num_loss_tokens)),
        }
