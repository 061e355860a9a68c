"""The example's base as a mixture of experts: sparse upcycling (arXiv 2212.05055), for tests.

Every expert of a layer begins as the dense layer's MLP with some noise, so that the policy still
reaches the goal now and then and training has something to learn from.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from shared.cli.records import RunRecords
from shared.wire.trajectory import Sequence, Trajectory

EXPERTS, CHOICES, LAYERS = 4, 2, 2


def upcycle(base: Path, out: Path, *, noise: float = 0.2, seed: int = 0) -> None:
    """Write a Qwen3-MoE made of the dense Qwen3 in `base`."""
    out.mkdir()
    for file in base.glob("*.json"):
        shutil.copy(file, out)
    config = json.loads((base / "config.json").read_text())
    config |= {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_experts": EXPERTS,
        "num_experts_per_tok": CHOICES,
        "moe_intermediate_size": config["intermediate_size"],
        "norm_topk_prob": True,
        "mlp_only_layers": [],
        "decoder_sparse_step": 1,
    }
    (out / "config.json").write_text(json.dumps(config, indent=2))
    dense = load_file(base / "model.safetensors")
    tensors = _tensors(dense, config["hidden_size"], noise, seed)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})


def sequences_of(records: RunRecords) -> list[Sequence]:
    """Return all sequences that were played in a run, with their routing."""
    played = [records.terminal(seq).outcome for seq in records.terminals]
    return [s for one in played if isinstance(one, Trajectory) for s in one.sequences]


def _tensors(
    dense: dict[str, torch.Tensor], hidden: int, noise: float, seed: int
) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    made: dict[str, torch.Tensor] = {}
    for name, tensor in dense.items():
        if ".mlp." not in name:
            made[name] = tensor
            continue
        for number in range(EXPERTS):
            shaken = torch.randn(tensor.shape, generator=draw) * tensor.std() * noise
            made[name.replace(".mlp.", f".mlp.experts.{number}.")] = tensor + shaken
    for layer in range(LAYERS):
        router = torch.randn(EXPERTS, hidden, generator=draw) * 0.2
        made[f"model.layers.{layer}.mlp.gate.weight"] = router
    return made
