"""Make the demo's base model: a tiny tokenizer and a small, barely competent Qwen3 policy.

    python examples/frozen_lake/make_base.py [--out DIR] [--seed N] [--head-dim N]

Seeded and single-threaded: the same versions of torch and transformers give the same bytes. The
policy is warmed up on noisy demonstrations (a third expert moves, the rest random), on maps of the
train split only, until it nearly always writes valid words and sometimes reaches the goal: what is
left to learn is left to reinforcement learning.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import Qwen3Config, Qwen3ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from services.env_agents.environment import StepResult
from services.env_agents.tasks.frozen_lake import ACTIONS, FrozenLake, draw_map, expert_actions
from shared.wire.messages import TaskRef

VOCABULARY = [*sorted("\n@>0123SFHG"), *ACTIONS]
"""Characters, and one token per word that the policy may answer: every sampled token decides."""
STOP_IDS = [VOCABULARY.index(word) for word in ACTIONS]
EXPERT_SHARE = 0.31
STEPS = 160
DEMONSTRATIONS = 64
LEARNING_RATE = 3e-3
MAX_ANSWER = 4
SUCCESS_RANGE = (0.05, 0.12)
"""Below it groups without any success starve the learner; above it too little is left to learn."""


def make_tokenizer() -> Tokenizer:
    """One id per word or character; any other text is an error, not an unknown token."""
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(VOCABULARY)}))
    pattern = "|".join([*ACTIONS, r"[\s\S]"])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def make_policy(head_dim: int) -> Qwen3ForCausalLM:
    """Qwen3 with 0.2 M parameters, in float32."""
    config = Qwen3Config(
        vocab_size=len(VOCABULARY),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        max_position_embeddings=256,
        # About 1/sqrt(hidden_size): with the default of 0.02, made for wide models, this one grows
        # sharp while it learns, and amplifies float32 rounding to 1e-4 nats.
        initializer_range=0.08,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=STOP_IDS,
        pad_token_id=None,
        dtype="float32",
    )
    return Qwen3ForCausalLM(config)


async def demonstrate(task: TaskRef, rng: random.Random) -> list[tuple[str, bool]]:
    """Play one noisy demonstration; its pieces of text, and which the policy would write."""
    env = FrozenLake({})
    observation = (await env.reset(task)).text
    expert = expert_actions(draw_map("train", task.seed, task.index))
    pieces: list[tuple[str, bool]] = []
    while True:
        pieces.append((observation, False))
        state = 4 * int(observation[-3]) + int(observation[-2])
        word = expert[state] if rng.random() < EXPERT_SHARE else rng.choice(ACTIONS)
        pieces.append((word, True))
        step = await env.step(word)
        if step.terminated or step.truncated:
            return pieces
        observation = step.observation.text


async def warm_up(policy: Qwen3ForCausalLM, tokenizer: Tokenizer, seed: int) -> None:
    """Supervised training on demonstrations, loss on the written tokens only."""
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / 10)
        rows: list[list[int]] = []
        masks: list[list[bool]] = []
        for number in range(DEMONSTRATIONS):
            index = step * DEMONSTRATIONS + number
            task = TaskRef(dataset="frozen_lake", split="train", index=index, seed=seed)
            encoded = [(tokenizer.encode(t).ids, w) for t, w in await demonstrate(task, rng)]
            rows.append([i for ids, _ in encoded for i in ids])
            masks.append([written for ids, written in encoded for _ in ids])
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        mask = torch.tensor([row + [False] * (longest - len(row)) for row in masks])[:, 1:]
        # Right padding: causal attention keeps it out of every position that counts.
        logits = policy(input_ids=ids).logits[:, :-1]
        loss = F.cross_entropy(logits[mask], ids[:, 1:][mask])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0 or step == STEPS - 1:
            print(f"warm-up step {step:3d}  loss {loss.item():.4f}", flush=True)


@torch.no_grad()
async def play_sampled(
    policy: Qwen3ForCausalLM, tokenizer: Tokenizer, tasks: list[TaskRef], seed: int
) -> tuple[list[float], float]:
    """Play every task once at temperature 1; rewards, and the share of valid words."""
    generator = torch.Generator().manual_seed(seed)
    envs = [FrozenLake({}) for _ in tasks]
    first = [await env.reset(task) for env, task in zip(envs, tasks, strict=True)]
    ids = [tokenizer.encode(observation.text).ids for observation in first]
    answers: list[list[int]] = [[] for _ in tasks]
    rewards = [0.0] * len(tasks)
    alive = list(range(len(tasks)))
    valid = words = 0
    while alive:
        lengths = torch.tensor([len(ids[i]) for i in alive])
        longest = int(lengths.max())
        batch = torch.tensor([ids[i] + [0] * (longest - len(ids[i])) for i in alive])
        logits = policy(input_ids=batch).logits[torch.arange(len(alive)), lengths - 1]
        drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0].tolist()
        ended: set[int] = set()
        for i, token in zip(alive, drawn, strict=True):
            ids[i].append(token)
            answers[i].append(token)
            if token not in STOP_IDS and len(answers[i]) < MAX_ANSWER:
                continue
            answer = tokenizer.decode(answers[i])
            answers[i] = []
            words += 1
            valid += answer in ACTIONS
            step: StepResult = await envs[i].step(answer)
            rewards[i] += step.reward
            if step.terminated or step.truncated:
                ended.add(i)
            else:
                ids[i] += tokenizer.encode(step.observation.text).ids
        alive = [i for i in alive if i not in ended]
    return rewards, valid / words


def save(policy: Qwen3ForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the Hugging Face directory."""
    folder.mkdir(parents=True, exist_ok=True)
    policy.generation_config.eos_token_id = STOP_IDS
    policy.generation_config.do_sample = True
    policy.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": policy.config.max_position_embeddings,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(described, indent=2) + "\n")


async def main(folder: Path, seed: int, head_dim: int) -> int:
    """Make, measure and save; 1 when the base is outside the range that the demo needs."""
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    started = time.perf_counter()
    tokenizer, policy = make_tokenizer(), make_policy(head_dim)
    num_parameters = sum(p.numel() for p in policy.parameters())
    print(f"{num_parameters:,} parameters, {len(VOCABULARY)} tokens, seed {seed}")
    await warm_up(policy, tokenizer, seed)
    policy.eval()
    tasks = [TaskRef(dataset="frozen_lake", split="eval", index=i, seed=seed) for i in range(256)]
    rewards, valid = await play_sampled(policy, tokenizer, tasks * 8, seed + 1)
    success = sum(rewards) / len(rewards)
    mixed = sum(0 < sum(rewards[i::256]) < 8 for i in range(256)) / 256
    print(
        f"eval maps, temperature 1, {len(rewards)} episodes: success {success:.3f}, valid words "
        f"{valid:.3f}, groups of 8 with both outcomes {mixed:.2f}"
    )
    save(policy, tokenizer, folder)
    print(f"saved to {folder} after {time.perf_counter() - started:.0f} s")
    if not SUCCESS_RANGE[0] <= success <= SUCCESS_RANGE[1] or valid < 0.97:
        print("outside the range that the demo needs: success 0.05 to 0.12, valid words >= 0.97")
        return 1
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "base")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--head-dim", type=int, default=24, help="vLLM on CPUs needs 32")
    arguments = parser.parse_args()
    raise SystemExit(asyncio.run(main(arguments.out, arguments.seed, arguments.head_dim)))
