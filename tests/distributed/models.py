"""Tiny models of the usual architectures, and the plain training step that backends must equal."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from shared.algo.batching import PackedBatch, pack

VOCAB = 37
BETAS, EPS, MAX_NORM, LR, STEPS = (0.9, 0.95), 1e-8, 1.0, 2e-3, 3
TEMPERATURE, ENTROPY_BONUS = 0.9, 0.02
MODELS = ("qwen3", "qwen3_tied", "llama", "qwen3_moe")


def write_model(path: Path, kind: str, seed: int, *, layers: int = 2, kv_heads: int = 2) -> Path:
    """Write a random model in float32; weights far from uniform, norms not all ones."""
    import transformers

    common = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": kv_heads,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": kind == "qwen3_tied",
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    }
    if kind == "llama":
        config = transformers.LlamaConfig(**common)
    elif kind == "qwen3_moe":
        config = transformers.Qwen3MoeConfig(
            **common,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=24,
            norm_topk_prob=True,
            decoder_sparse_step=1,
            router_aux_loss_coef=0.0,
        )
    else:
        config = transformers.Qwen3Config(**common)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
            else:
                parameter.copy_(0.15 * torch.randn_like(parameter))
    model.save_pretrained(path)
    (path / "tokenizer.json").write_text('{"kind": "test"}')
    (path / "generation_config.json").write_text('{"eos_token_id": 3}')
    return path


def step_sequences(seed: int, step: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return token ids and loss masks of one optimizer step."""
    rng = np.random.default_rng([seed, step])
    lengths = (23, 9, 40, 23, 31, 2, 38, 14)
    ids = [rng.integers(0, VOCAB, n) for n in lengths]
    masks = [rng.random(n) < 0.6 for n in lengths]
    return ids, masks


def packs(seed: int, step: int, shares: list[list[int]]) -> list[PackedBatch]:
    """Return the micro-batches of one rank; an empty share is one token without loss."""
    ids, masks = step_sequences(seed, step)
    batches: list[PackedBatch] = []
    for indices in shares:
        chosen = [ids[i] for i in indices] or [np.array([0])]
        mask = [masks[i] for i in indices] or [np.array([False])]
        batches.append(pack(chosen, {"loss_mask": mask}))
    return batches


def num_loss_tokens(seed: int, step: int) -> int:
    _, masks = step_sequences(seed, step)
    return sum(int(mask[1:].sum()) for mask in masks)


def plain_logprobs(path: Path, batch: PackedBatch) -> torch.Tensor:
    """Return logprobs_T of the plain Hugging Face model, one unpadded sequence at a time."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="sdpa"
    )
    rows: list[torch.Tensor] = []
    with torch.no_grad():
        for ids_T in batch.split(batch.token_ids_T):
            logp = torch.log_softmax(model(input_ids=ids_T[None]).logits[0] / TEMPERATURE, -1)
            rows += [logp.new_zeros(1), logp[:-1].gather(1, ids_T[1:, None])[:, 0]]
    return torch.cat(rows)


def train_plainly(
    path: Path, seed: int, steps: int = STEPS
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Three AdamW steps of the plain Hugging Face model, one unpadded sequence at a time.

    Returns:
        Tensors by published name before and after.
    """
    from transformers import AutoModelForCausalLM

    from shared.backends.hf_names import published_places, stream

    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="sdpa"
    )
    places = published_places(model)
    before = {name: tensor.clone() for name, tensor in stream(model, places)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, eps=EPS, weight_decay=0.0)
    for step in range(steps):
        ids, masks = step_sequences(seed, step)
        count = num_loss_tokens(seed, step)
        for tokens, mask in zip(ids, masks, strict=True):
            here = torch.as_tensor(mask[1:])
            if not here.any():
                continue
            ids_T = torch.as_tensor(tokens)
            logits = model(input_ids=ids_T[None]).logits[0, :-1] / TEMPERATURE
            logp = torch.log_softmax(logits, -1)
            chosen = logp.gather(1, ids_T[1:, None])[:, 0]
            entropy = -(logp.exp() * logp).sum(-1)
            loss = (-(chosen + ENTROPY_BONUS * entropy) * here).sum() / count
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
    after = {name: tensor.clone() for name, tensor in stream(model, places)}
    return before, after


class Loss:
    """The same loss for a backend: divided by the count of the whole step, over all ranks."""

    def __init__(self, seed: int, step: int) -> None:
        self.count = num_loss_tokens(seed, step)

    def __call__(self, output, batch: PackedBatch) -> torch.Tensor:
        return -(output.logprobs_T + ENTROPY_BONUS * output.entropy_T).sum() / self.count
