"""Tiny models of the usual architectures, and the plain training step that backends must equal."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch

from shared.algo.batching import PackedBatch, pack
from shared.backends.routing import NOT_RECORDED, ROUTING

VOCAB = 37
BETAS, EPS, MAX_NORM, LR, STEPS = (0.9, 0.95), 1e-8, 1.0, 2e-3, 3
TEMPERATURE, ENTROPY_BONUS = 0.9, 0.02
MODELS = ("qwen3", "qwen3_tied", "llama", "qwen3_moe")
EXPERTS, PER_TOKEN = 4, 2


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
            num_experts=EXPERTS,
            num_experts_per_tok=PER_TOKEN,
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


def random_experts(rng: np.random.Generator, num_tokens: int, layers: int) -> np.ndarray:
    """Return distinct experts [T, layers, PER_TOKEN] that no router chose, but for chance."""
    every = np.tile(np.arange(EXPERTS, dtype=np.int16), (num_tokens, layers, 1))
    return rng.permuted(every, axis=-1)[..., :PER_TOKEN].copy()


def step_routing(seed: int, step: int, layers: int = 2) -> list[np.ndarray]:
    """Return experts [T, layers, PER_TOKEN] of each sequence: at random, a tenth left out."""
    rng = np.random.default_rng([seed, step, 1])
    routing: list[np.ndarray] = []
    for ids in step_sequences(seed, step)[0]:
        rows_TLK = random_experts(rng, len(ids), layers)
        rows_TLK[rng.random(len(ids)) < 0.1] = NOT_RECORDED
        routing.append(rows_TLK)
    return routing


def packs(seed: int, step: int, shares: list[list[int]], *, routed: int = 0) -> list[PackedBatch]:
    """Return the micro-batches of one rank; an empty share is one token without loss.

    With `routed`, the number of the model's layers, they replay the experts of `step_routing`.
    """
    ids, masks = step_sequences(seed, step)
    routing = step_routing(seed, step, routed)
    batches: list[PackedBatch] = []
    for indices in shares:
        chosen = [ids[i] for i in indices] or [np.array([0])]
        mask = [masks[i] for i in indices] or [np.array([False])]
        per_token = {"loss_mask": mask}
        if routed:
            nobodys = np.full((1, routed, PER_TOKEN), NOT_RECORDED, dtype=np.int16)
            per_token[ROUTING] = [routing[i] for i in indices] or [nobodys]
        batches.append(pack(chosen, per_token))
    return batches


def num_loss_tokens(seed: int, step: int) -> int:
    _, masks = step_sequences(seed, step)
    return sum(int(mask[1:].sum()) for mask in masks)


def plain_logprobs(path: Path, batch: PackedBatch) -> torch.Tensor:
    """Return logprobs_T of the plain Hugging Face model, one unpadded sequence at a time.

    Recorded experts that the batch carries are taken, one after the other.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="sdpa"
    )
    rows: list[torch.Tensor] = []
    routing_TLK = batch.per_token.get(ROUTING)
    experts = None if routing_TLK is None else ExpertByExpert(model)
    with torch.no_grad():
        for number, ids_T in enumerate(batch.split(batch.token_ids_T)):
            if experts is not None:
                experts.rows_TLK = batch.split(routing_TLK)[number].numpy()
            logp = torch.log_softmax(model(input_ids=ids_T[None]).logits[0] / TEMPERATURE, -1)
            rows += [logp.new_zeros(1), logp[:-1].gather(1, ids_T[1:, None])[:, 0]]
    return torch.cat(rows)


class ExpertByExpert:
    """The experts of a plain Hugging Face model, one token and one expert after the other."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.rows_TLK: np.ndarray | None = None
        """Of the sequence that is forwarded."""
        for number, layer in enumerate(model.model.layers):
            layer.mlp.forward = partial(self._forward, layer.mlp, number)

    def _forward(self, block, number: int, hidden_1TD: torch.Tensor) -> torch.Tensor:
        experts, out = block.experts, []
        for token, x in enumerate(hidden_1TD[0]):
            logits = block.gate.weight @ x
            probs = torch.softmax(logits, 0, dtype=torch.float32)
            chosen = probs.topk(PER_TOKEN).indices.tolist()
            if self.rows_TLK is not None and self.rows_TLK[token, number, 0] != NOT_RECORDED:
                chosen = self.rows_TLK[token, number].tolist()
            total = sum(probs[expert] for expert in chosen)
            y = torch.zeros_like(x)
            for expert in chosen:
                gate, up = (experts.gate_up_proj[expert] @ x).chunk(2)
                fed = experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up)
                y = y + (probs[expert] / total).to(x.dtype) * fed
            out.append(y)
        return torch.stack(out)[None]


def train_plainly(
    path: Path, seed: int, steps: int = STEPS, *, routed: int = 0
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Three AdamW steps of the plain Hugging Face model, one unpadded sequence at a time.

    `routed`: as in `packs`.

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
    experts = ExpertByExpert(model) if routed else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, eps=EPS, weight_decay=0.0)
    for step in range(steps):
        ids, masks = step_sequences(seed, step)
        count = num_loss_tokens(seed, step)
        routing = step_routing(seed, step, routed)
        for tokens, mask, rows_TLK in zip(ids, masks, routing, strict=True):
            here = torch.as_tensor(mask[1:])
            if not here.any():
                continue
            ids_T = torch.as_tensor(tokens)
            if experts is not None:
                experts.rows_TLK = rows_TLK
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
