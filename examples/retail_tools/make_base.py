"""Make the base model of the retail_tools demo: tokenizer, template, a barely competent Qwen3.

    python examples/retail_tools/make_base.py --out DIR [--seed N]

Seeded and single-threaded: the same versions of torch and transformers give the same bytes. The
policy is warmed up on noisy demonstrations (`demonstrations.py`) of tasks of the train split only,
until it writes well-formed calls and sometimes solves a task: what is left to learn is left to
reinforcement learning. `make demo TASK=retail_tools` runs it where there is no base yet.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shutil
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import Qwen3Config, Qwen3ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from demonstrations import MAX_TURNS, demonstrate
from vocabulary import STOP, make_tokenizer

from services.env_agents.answer import Answer
from services.env_agents.chat.renderer import ChatRenderer
from services.env_agents.tasks.retail_tools.environment import RetailTools
from shared.wire.messages import TaskRef

HERE = Path(__file__).resolve().parent
OPTIONS = {"domains": ["retail_small"], "personalities": ["direct", "terse"]}
"""`task.options` of values.yaml."""
NOISE = 0.35
STEPS = 440
DEMONSTRATIONS = 32
LONGEST = 128
"""Tokens of a demonstration that are trained on; few are longer."""
LEARNING_RATE = 8e-3
SMOOTHING = 0.02
"""Of what is written: no token is certain. The ends of calls and answers, four tokens in ten, would
otherwise have a log-prob of 0 in every engine, and say nothing about exactness (frozen_lake's
README)."""
READ_WEIGHT = 1.0
"""Of the loss on what the policy only reads: tools repeat what the user said, so that it learns
to copy ids a good deal earlier."""
MAX_ANSWER = 12
SUCCESS_RANGE = (0.1, 0.4)
"""Below it too few groups have a success; above it too little is left to learn."""


def make_policy(vocabulary: int, stop_id: int) -> Qwen3ForCausalLM:
    """Qwen3 with 0.23 M parameters, in float32; tied, because ids are copied."""
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,
        max_position_embeddings=512,
        # About 1/sqrt(hidden_size): see examples/frozen_lake/make_base.py.
        initializer_range=0.08,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=[stop_id],
        pad_token_id=None,
        dtype="float32",
    )
    return Qwen3ForCausalLM(config)


def describe(folder: Path) -> ChatRenderer:
    """Write what a renderer reads of a model directory, and make the renderer."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    shutil.copyfile(HERE / "chat_template.jinja", folder / "chat_template.jinja")
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": STOP,
        "clean_up_tokenization_spaces": False,
    }
    stops = {"eos_token_id": [tokenizer.token_to_id(STOP)], "do_sample": True}
    for name, content in (("tokenizer_config", described), ("generation_config", stops)):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
    return ChatRenderer(str(folder), {})


async def warm_up(policy: Qwen3ForCausalLM, renderer: ChatRenderer, seed: int) -> None:
    """Supervised training on demonstrations."""
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=LEARNING_RATE, weight_decay=0.0, betas=(0.9, 0.98)
    )
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / 20, 2 * (1 - step / STEPS))
        rows: list[list[int]] = []
        masks: list[list[bool]] = []
        for number in range(DEMONSTRATIONS):
            index = step * DEMONSTRATIONS + number
            task = TaskRef(dataset="retail_tools", split="train", index=index, seed=seed)
            ids, written, _ = await demonstrate(renderer, task, OPTIONS, rng, NOISE)
            rows.append(ids[:LONGEST])
            masks.append(written[:LONGEST])
        loss = _loss(policy, rows, masks)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == STEPS - 1:
            print(f"warm-up step {step:3d}  loss {loss.item():.4f}", flush=True)


def _loss(policy: Qwen3ForCausalLM, rows: list[list[int]], masks: list[list[bool]]) -> torch.Tensor:
    """Return the mean loss of what is written, and of what is read, weighted."""
    longest = max(map(len, rows))
    ids_BT = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    written_BT = torch.tensor([row + [False] * (longest - len(row)) for row in masks])[:, 1:]
    padded_BT = torch.tensor([[t >= len(row) for t in range(1, longest)] for row in rows])
    # Right padding: causal attention keeps it out of every position that counts.
    logits = policy(input_ids=ids_BT).logits[:, :-1]
    targets_BT = ids_BT[:, 1:]
    read_BT = ~written_BT & ~padded_BT
    written = F.cross_entropy(logits[written_BT], targets_BT[written_BT], label_smoothing=SMOOTHING)
    return written + READ_WEIGHT * F.cross_entropy(logits[read_BT], targets_BT[read_BT])


@torch.no_grad()
async def play_sampled(
    policy: Qwen3ForCausalLM, renderer: ChatRenderer, tasks: list[TaskRef], seed: int
) -> list[float]:
    """Play every task once at temperature 1; the rewards."""
    generator = torch.Generator().manual_seed(seed)
    stop_id = renderer.stop_ids[0]
    envs = [RetailTools(OPTIONS) for _ in tasks]
    conversations = [renderer.conversation() for _ in tasks]
    ids = [
        conversation.begin(await env.reset(task))
        for conversation, env, task in zip(conversations, envs, tasks, strict=True)
    ]
    answers: list[list[int]] = [[] for _ in tasks]
    turns, rewards = [0] * len(tasks), [0.0] * len(tasks)
    alive = list(range(len(tasks)))
    while alive:
        lengths = torch.tensor([len(ids[i]) for i in alive])
        longest = int(lengths.max())
        batch = torch.tensor([ids[i] + [0] * (longest - len(ids[i])) for i in alive])
        hidden = policy.model(input_ids=batch).last_hidden_state
        logits = policy.lm_head(hidden[torch.arange(len(alive)), lengths - 1])
        drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0].tolist()
        ended: set[int] = set()
        for i, token in zip(alive, drawn, strict=True):
            ids[i].append(token)
            answers[i].append(token)
            if token != stop_id and len(answers[i]) < MAX_ANSWER:
                continue
            text, parsed = conversations[i].read(answers[i])
            answers[i] = []
            turns[i] += 1
            step = await envs[i].act(Answer(text, parsed))
            rewards[i] += step.reward
            if step.terminated or turns[i] == MAX_TURNS:
                ended.add(i)
                continue
            ids[i] += conversations[i].follow(step.observation).token_ids
            if len(ids[i]) > 300:
                ended.add(i)
        alive = [i for i in alive if i not in ended]
    return rewards


async def main(folder: Path, seed: int) -> int:
    """Make, measure and save; 1 when the base is outside the range that the demo needs."""
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    started = time.perf_counter()
    (folder / "config.json").unlink(missing_ok=True)  # of an earlier vocabulary
    renderer = describe(folder)
    stop_id = renderer.stop_ids[0]
    policy = make_policy(stop_id + 4, stop_id)
    num_parameters = sum(p.numel() for p in policy.parameters())
    print(f"{num_parameters:,} parameters, {policy.config.vocab_size} tokens, seed {seed}")
    await warm_up(policy, renderer, seed)
    policy.eval()
    tasks = [TaskRef(dataset="retail_tools", split="eval", index=i, seed=seed) for i in range(64)]
    rewards = await play_sampled(policy, renderer, tasks * 8, seed + 1)
    success = sum(rewards) / len(rewards)
    mixed = sum(0 < sum(rewards[i::64]) < 8 for i in range(64)) / 64
    print(
        f"held-out tasks, temperature 1, {len(rewards)} episodes: success {success:.3f}, groups of "
        f"8 with both outcomes {mixed:.2f}"
    )
    policy.save_pretrained(folder)
    describe(folder)
    print(f"saved to {folder} after {time.perf_counter() - started:.0f} s")
    if not SUCCESS_RANGE[0] <= success <= SUCCESS_RANGE[1]:
        print(f"outside the range that the demo needs: success {SUCCESS_RANGE}")
        return 1
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=7)
    arguments = parser.parse_args()
    raise SystemExit(asyncio.run(main(arguments.out, arguments.seed)))
