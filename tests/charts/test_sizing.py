"""The sized examples: both architectures are built, the docs' arithmetic is recomputed."""

from __future__ import annotations

import json
import math
import re
from functools import lru_cache
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from services.learner.config import LearnerConfig
from services.rollout.config import RolloutConfig
from shared.cli.config_cmd import read, validate
from shared.runtime.model_source import HubSource, parse
from shared.weights.layouts import check_cover
from shared.weights.qwen3_layout import EngineChoices, Qwen3Shape, qwen3_layout
from shared.wire.weights import TensorSpec

pytestmark = pytest.mark.chart

ROOT = Path(__file__).parents[2]
MODELS = Path(__file__).with_name("models")
EXAMPLES = {"qwen3-4b": 4.02e9, "qwen3-30b-a3b": 30.5e9}
LEARNER_BYTES = 2 + 2 + 4 + 12
GPU_BYTES = 80e9


@lru_cache
def build(name: str) -> torch.nn.Module:
    """The architecture without any memory."""
    config = AutoConfig.from_pretrained(MODELS / name, local_files_only=True)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def num_parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_model_is_built_on_the_meta_device_with_the_stated_size(name: str):
    model = build(name)
    assert num_parameters(model) == pytest.approx(EXAMPLES[name], rel=0.005)
    assert all(p.device.type == "meta" and p.dtype == torch.bfloat16 for p in model.parameters())


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_is_a_valid_run_of_that_model(name: str):
    values = read(ROOT / f"examples/{name}.yaml")
    models = validate(values)
    learner = models["learner"]
    assert isinstance(learner, LearnerConfig)
    source = parse(learner.model.source)
    assert isinstance(source, HubSource)
    assert source.repository.lower().rpartition("/")[2] == name
    limit = build(name).config.max_position_embeddings  # type: ignore[union-attr]
    assert learner.sampling.context_tokens <= limit


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_gpus_of_the_example_hold_what_the_formulas_say(name: str):
    tree = yaml.safe_load((ROOT / f"examples/{name}.yaml").read_text())
    size = num_parameters(build(name))
    learner_gpus = tree["learner"]["gpu"]["count"] * tree["learner"].get("nodes", 1)
    assert size * LEARNER_BYTES < 0.9 * learner_gpus * GPU_BYTES
    for role in ("rollout", "logit_oracle"):
        assert size * 2 < 0.8 * tree[role]["gpu"]["count"] * GPU_BYTES
    streams = 10 * tree["config"]["bus"]["max_stream_bytes"]
    storage = int(tree["nats"]["storage"]["size"].removesuffix("Gi")) * 2**30
    assert streams + 64 * 2**20 < storage
    claim = tree["learner"]["storage"].get("size")
    if claim:
        assert 3 * 14 * size < int(claim.removesuffix("Gi")) * 2**30


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_rollouts_of_the_example_use_their_gpus_and_have_memory_for_two_copies(name: str):
    """One copy in /dev/shm for the engine's workers, one that the follower patches."""
    tree = yaml.safe_load((ROOT / f"examples/{name}.yaml").read_text())
    rollout = validate(read(ROOT / f"examples/{name}.yaml"))["rollout"]
    assert isinstance(rollout, RolloutConfig)
    assert rollout.rollout.engine == "vllm", "the torch engine computes on CPUs"
    assert rollout.rollout.vllm.tensor_parallel_size == tree["rollout"]["gpu"]["count"]
    weights = num_parameters(build(name)) * 2
    shm = int(tree["rollout"]["shmSize"].removesuffix("Gi")) * 2**30
    memory = tree["rollout"]["resources"]
    assert shm > 1.1 * weights
    for bound in (memory["requests"], memory["limits"]):
        assert int(bound["memory"].removesuffix("Gi")) * 2**30 > shm + weights + 8e9


def test_the_table_in_the_docs_is_this_arithmetic():
    text = (ROOT / "docs/deploy.md").read_text()
    for column, name in ((3, "qwen3-4b"), (4, "qwen3-30b-a3b")):
        model = build(name)
        size, config = num_parameters(model), model.config
        kv = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2  # type: ignore[union-attr]
        expected = {
            "weights W": size * 2 / 1e9,
            "learner, all GPUs together": size * LEARNER_BYTES / 1e9,
            "checkpoint": size * 14 / 1e9,
            "keyframe": size * 2 * 0.68 / 1e9,
            "delta per version, lr 1e-6": size * 2 * 0.0082 / 1e6,
        }
        rows = {
            row.split("|")[1].strip(): row.split("|") for row in text.splitlines() if "|" in row
        }
        for what, value in expected.items():
            stated = float(re.findall(r"[\d.]+", rows[what][column])[0])
            assert stated == pytest.approx(value, rel=0.02), (name, what)
        assert f"{kv / 1000:.0f} KB" in rows["rollout"][column]


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_rollouts_of_the_example_hold_the_whole_model_between_their_gpus(name: str):
    """The tensor-parallel layout over `rollout.gpu.count` ranks covers every published tensor."""
    tree = yaml.safe_load((ROOT / f"examples/{name}.yaml").read_text())
    ranks = tree["rollout"]["gpu"]["count"]
    model = build(name)
    names = dict(model.named_parameters())
    stacked = any(key.endswith("experts.gate_up_proj") for key in names)
    choices = EngineChoices(stacked_source=stacked)
    shape = Qwen3Shape.of(json.loads((MODELS / name / "config.json").read_text()))
    layouts = [qwen3_layout(shape, rank, ranks, choices) for rank in range(ranks)]
    specs = [
        TensorSpec(name=key, shape=tuple(tensor.shape), dtype="BF16", digest="0" * 16)
        for key, tensor in names.items()
    ]
    check_cover(layouts, specs)
    held = sum(math.prod(t.shape) for t in layouts[0].tensors.values())
    assert held * 2 < 0.8 * GPU_BYTES
    assert held == pytest.approx(num_parameters(model) / ranks, rel=0.05)


def test_the_routing_of_the_mixture_fits_the_bus_as_its_example_says():
    """Answers of two versions into one message; trajectories as long as stated into a stream."""
    text = (ROOT / "examples/qwen3-30b-a3b.yaml").read_text()
    tree = yaml.safe_load(text)
    config = tree["config"]
    assert config["model"]["routing"] == "replay"
    shape = Qwen3Shape.of(json.loads((MODELS / "qwen3-30b-a3b/config.json").read_text()))
    choices = build("qwen3-30b-a3b").config.num_experts_per_tok  # type: ignore[union-attr]
    a_token = len(shape.moe_layers) * choices
    assert shape.num_experts <= 256
    assert f"{a_token} bytes a token" in text
    answer = 2 * config["sampling"]["context_tokens"] * a_token
    assert answer < int(tree["nats"]["maxPayload"].removesuffix("MB")) * 1_000_000
    admission, checkpoint = config["admission"], config["learner"]["checkpoint"]
    versions = checkpoint["keep"] * checkpoint["every_versions"] + admission["max_staleness"]
    trajectories = admission["groups_per_version"] * admission["group_size"] * versions
    room = config["bus"]["max_stream_bytes"] / (trajectories * (a_token + 9))
    stated = re.search(r"room for\n#\s+([\d,]+) tokens", text)
    assert stated
    assert 0.95 * room < int(stated[1].replace(",", "")) <= room
