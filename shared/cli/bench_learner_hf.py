"""Plain transformers contenders of `make bench-learner`: full logits, a clipped loss, torch AdamW.

AdamW is torch's fused one, the fastest there is on CPUs. Attention is SDPA.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from shared.cli.bench_learner_data import Sequences
from shared.cli.bench_learner_worker import LEARNING_RATE

CLIP = 0.2


class _Plain:
    def __init__(self, model: Path, data: Sequences, micro_tokens: int) -> None:
        from transformers import AutoModelForCausalLM

        self.model: Any = AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.float32, attn_implementation="sdpa"
        ).train()
        self._optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0,
            fused=True,
        )  # fmt: skip
        self.data = data
        self.micro_tokens = micro_tokens

    def micro_batches(self) -> Iterator[dict[str, torch.Tensor]]:
        """Yield input_ids and what goes with them, [rows, columns]; `mask` where there is loss."""
        raise NotImplementedError

    def step(self) -> float:
        count = self.data.num_loss_tokens
        for batch in self.micro_batches():
            inputs = {
                name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")
                if name in batch
            }  # fmt: skip
            logits = self.model(**inputs, use_cache=False).logits[:, :-1].float()
            targets = batch["input_ids"][:, 1:]
            logprobs = -functional.cross_entropy(
                logits.flatten(0, 1), targets.flatten(), reduction="none"
            ).view_as(targets)
            ratio = torch.exp(logprobs - batch["old"][:, 1:])
            advantages = batch["advantages"][:, 1:]
            gain = torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)
            (-(gain * batch["mask"][:, 1:]).sum() / count).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def rows(self, indices: range) -> dict[str, list[torch.Tensor]]:
        found: dict[str, list[torch.Tensor]] = {
            name: [] for name in ("input_ids", "position_ids", "old", "advantages", "mask")
        }
        for i in indices:
            length, prompt = len(self.data.token_ids[i]), self.data.prompts[i]
            found["input_ids"].append(torch.from_numpy(self.data.token_ids[i]))
            found["position_ids"].append(torch.arange(length))
            found["old"].append(torch.from_numpy(self.data.old_logprobs[i]))
            found["advantages"].append(torch.full((length,), self.data.advantages[i]))
            found["mask"].append((torch.arange(length) >= prompt).float())
        return found


class Padded(_Plain):
    """Sequences in order of arrival, as many as make a micro-batch at their mean length.

    Padded on the right to the longest of the micro-batch; the mask is left out where nothing is
    padded, so that attention is plainly causal there.
    """

    def micro_batches(self) -> Iterator[dict[str, torch.Tensor]]:
        count = len(self.data.token_ids)
        size = max(1, round(self.micro_tokens * count / self.data.num_tokens))
        for start in range(0, count, size):
            rows = self.rows(range(start, min(start + size, count)))
            lengths = [len(ids) for ids in rows["input_ids"]]
            batch = {
                name: torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True)
                for name, tensors in rows.items()
                if name != "position_ids"
            }
            if len(set(lengths)) > 1:
                columns = torch.arange(max(lengths))
                batch["attention_mask"] = (columns < torch.tensor(lengths)[:, None]).long()
            yield batch


class Flat(_Plain):
    """Padding-free as DataCollatorWithFlattening does it: one row, positions that start over.

    transformers sees the packed sequences in the positions and masks attention by blocks.
    """

    def micro_batches(self) -> Iterator[dict[str, torch.Tensor]]:
        lengths = [len(ids) for ids in self.data.token_ids]
        start = 0
        while start < len(lengths):
            stop = start + 1
            while stop < len(lengths) and sum(lengths[start : stop + 1]) <= self.micro_tokens:
                stop += 1
            rows = self.rows(range(start, stop))
            for mask in rows["mask"]:
                mask[0] = 0.0  # the row before it is another sequence's
            yield {name: torch.cat(tensors)[None] for name, tensors in rows.items()}
            start = stop


class Loop(_Plain):
    """Padding-free as one forward and backward per sequence."""

    def micro_batches(self) -> Iterator[dict[str, torch.Tensor]]:
        for i in range(len(self.data.token_ids)):
            rows = self.rows(range(i, i + 1))
            yield {n: t[0][None] for n, t in rows.items() if n != "position_ids"}


def write_model(shape: dict[str, Any], path: Path) -> int:
    """Write a random Qwen3; return its number of parameters."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**shape, tie_word_embeddings=True))
    model.save_pretrained(path)
    return sum(p.numel() for p in model.parameters())
