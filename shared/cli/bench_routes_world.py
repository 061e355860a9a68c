"""The compact world of `make bench-routes`: base policies, and the sampler's weights.

A base policy is a small Qwen3 with the demo's tokenizer, warmed up on noisy demonstrations. It is
made once per seed and kept in a folder.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from services.env_agents.tasks.frozen_lake import ACTIONS, FrozenLake, draw_map, expert_actions
from services.env_agents.text_renderer import TextRenderer
from shared.algo.batching import PackedBatch, pack
from shared.backends.adamw import AdamWSettings
from shared.backends.base import ForwardOutput
from shared.backends.torch_backend import TorchBackend
from shared.cli.bench_routes_cells import Sampler, Size
from shared.wire.messages import TaskRef

BASE_OF_DEMO = Path(__file__).resolve().parents[2] / "examples" / "frozen_lake" / "base"
CONTEXT_TOKENS = 96
"""A map, a position, and ten moves with the positions they lead to."""

EXPERT_SHARE = 0.35
WARMUP_LR = 3e-3
GROUP = 32
"""Weights that share one int4 scale, along the input."""


def base_policy(folder: Path, size: Size, seed: int) -> Path:
    """Return the directory of a seed's base policy; make it when it is not there."""
    path = folder / f"h{size.hidden}x{size.layers}w{size.warmup_steps}-{seed}"
    if not path.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            made = Path(work) / "made"
            _warm_up(_blank(Path(work) / "blank", size, seed), made, size, seed)
            try:
                os.replace(made, path)
            except OSError:
                if not path.is_dir():  # another worker was faster: the same bytes
                    raise
    return path


def open_backend(path: Path, optimizer: AdamWSettings | None = None) -> TorchBackend:
    """Load a base policy into a float32 backend."""
    backend = TorchBackend(torch.float32, optimizer=optimizer)
    backend.load_hf(path)
    return backend


def sampler_state(state: Mapping[str, torch.Tensor], sampler: Sampler) -> dict[str, torch.Tensor]:
    """Return copies of the weights as the inference side holds them."""
    match sampler:
        case "fp32":
            return {name: value.clone() for name, value in state.items()}
        case "bf16":
            return {name: value.bfloat16().float() for name, value in state.items()}
        case "int4":
            return {
                name: fake_int4(value) if _is_projection(name) else value.clone()
                for name, value in state.items()
            }


def fake_int4(weight: torch.Tensor) -> torch.Tensor:
    """Round to 15 levels per group of inputs, symmetric around 0, and back to float."""
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -columns % GROUP))
    groups = padded.reshape(rows, -1, GROUP)
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 7.0
    rounded = (groups / scale).round().clamp(-7, 7) * scale
    return rounded.reshape(rows, -1)[:, :columns].contiguous()


def _is_projection(name: str) -> bool:
    return ".layers." in name and name.endswith("_proj.weight")


def _blank(path: Path, size: Size, seed: int) -> Path:
    """Write a model directory with fresh weights."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    heads = 4
    config = Qwen3Config.from_pretrained(
        BASE_OF_DEMO,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        layer_types=["full_attention"] * size.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=size.hidden // heads,
        max_position_embeddings=128,
        initializer_range=size.hidden**-0.5,
    )
    Qwen3ForCausalLM(config).save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(BASE_OF_DEMO / name, path / name)
    return path


def _warm_up(blank: Path, made: Path, size: Size, seed: int) -> None:
    """Train on demonstrations, loss on the written moves, and write the result."""
    backend = open_backend(blank, AdamWSettings(betas=(0.9, 0.95)))
    renderer = TextRenderer(str(blank), {})
    rng = random.Random(seed)
    for step in range(size.warmup_steps):
        batch = asyncio.run(_demonstrations(renderer, rng, size, seed, step))
        num_written = float(batch.per_token["loss_mask"].sum())

        def loss(
            output: ForwardOutput, packed: PackedBatch, by: float = num_written
        ) -> torch.Tensor:
            return -(output.logprobs_T * packed.per_token["loss_mask"]).sum() / by

        backend.forward_backward(batch, loss, temperature=1.0, with_entropy=False)
        backend.step(WARMUP_LR * min(1.0, (step + 1) / 10), max_grad_norm=1.0)
    backend.export_hf(made)


async def _demonstrations(
    renderer: TextRenderer, rng: random.Random, size: Size, seed: int, step: int
) -> PackedBatch:
    rows: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    for number in range(size.demonstrations):
        index = step * size.demonstrations + number
        task = TaskRef(dataset="frozen_lake", split="train", index=index, seed=-1 - seed)
        pieces = await _demonstrate(task, rng)
        encoded = [(renderer.observation(text), written) for text, written in pieces]
        rows.append(np.array([i for ids, _ in encoded for i in ids]))
        masks.append(np.array([float(written) for ids, written in encoded for _ in ids], "f4"))
    return pack(rows, {"loss_mask": masks})


async def _demonstrate(task: TaskRef, rng: random.Random) -> list[tuple[str, bool]]:
    """Play one noisy demonstration; its pieces of text, and which the policy would write."""
    env = FrozenLake({})
    text = (await env.reset(task)).text
    expert = expert_actions(draw_map("train", task.seed, task.index))
    pieces: list[tuple[str, bool]] = []
    while True:
        pieces.append((text, False))
        state = 4 * int(text[-3]) + int(text[-2])
        word = expert[state] if rng.random() < EXPERT_SHARE else rng.choice(ACTIONS)
        pieces.append((word, True))
        step = await env.step(word)
        if step.terminated or step.truncated:
            return pieces
        text = step.observation.text
