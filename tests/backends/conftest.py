"""A tiny Qwen3 on disk, and a second forward that shares no code with the backend."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

from shared.backends.torch_backend import TorchBackend

VOCAB, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 37, 32, 4, 2, 8, 2
ROPE_THETA, EPS = 10_000.0, 1e-6


settings.register_profile("torch", settings.get_profile("suite"), max_examples=60, derandomize=True)
settings.load_profile("torch")


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """For every test of the folder."""


@pytest.fixture(scope="session")
def write_model() -> Callable[..., Path]:
    def write(path: Path, *, seed: int = 0, tied: bool = True) -> Path:
        from transformers import Qwen3Config, Qwen3ForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        torch.manual_seed(seed)
        config = Qwen3Config(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            intermediate_size=48,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            max_position_embeddings=256,
            rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
            rms_norm_eps=EPS,
            tie_word_embeddings=tied,
        )
        model = Qwen3ForCausalLM(config)
        with torch.no_grad():  # far from uniform, and norms that are not all ones
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.add_(0.2 * torch.randn_like(parameter))
                else:
                    parameter.mul_(6.0)
        model.save_pretrained(path)
        (path / "tokenizer.json").write_text('{"kind": "test"}')
        return path

    return write


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory, write_model: Callable[..., Path]) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tied")


@pytest.fixture
def backend64(model_dir: Path) -> TorchBackend:
    backend = TorchBackend(torch.float64)
    backend.load_hf(model_dir)
    return backend


@pytest.fixture
def backend32(model_dir: Path) -> TorchBackend:
    backend = TorchBackend(torch.float32)
    backend.load_hf(model_dir)
    return backend


@pytest.fixture
def sequences() -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    return [rng.integers(0, VOCAB, n) for n in (23, 9, 40, 1, 23, 31, 2, 38)]


@pytest.fixture(scope="session")
def reference() -> Callable[..., torch.Tensor]:
    return reference_logprobs


def reference_logprobs(
    state: Mapping[str, torch.Tensor], token_ids: np.ndarray, temperature: float = 1.0
) -> torch.Tensor:
    """The oracle of `offpolicy.md` 10.1: float64, one sequence, unpadded, token by token."""
    w = {name: tensor.double() for name, tensor in state.items()}
    ids = torch.as_tensor(np.array(token_ids)).long()
    x = w["model.embed_tokens.weight"][ids]
    for layer in range(LAYERS):
        p = f"model.layers.{layer}."
        h = _rms(x, w[p + "input_layernorm.weight"])
        q = _heads(h @ w[p + "self_attn.q_proj.weight"].T)
        k = _heads(h @ w[p + "self_attn.k_proj.weight"].T)
        v = _heads(h @ w[p + "self_attn.v_proj.weight"].T)
        q = _rotate(_rms(q, w[p + "self_attn.q_norm.weight"]))
        k = _rotate(_rms(k, w[p + "self_attn.k_norm.weight"]))
        mixed = torch.zeros(len(ids), HEADS, HEAD_DIM, dtype=torch.float64)
        for head in range(HEADS):
            group = head // (HEADS // KV_HEADS)
            for t in range(len(ids)):
                scores = k[: t + 1, group] @ q[t, head] / math.sqrt(HEAD_DIM)
                mixed[t, head] = torch.softmax(scores, 0) @ v[: t + 1, group]
        x = x + mixed.flatten(1) @ w[p + "self_attn.o_proj.weight"].T
        h = _rms(x, w[p + "post_attention_layernorm.weight"])
        gate = h @ w[p + "mlp.gate_proj.weight"].T
        up = h @ w[p + "mlp.up_proj.weight"].T
        x = x + (gate * torch.sigmoid(gate) * up) @ w[p + "mlp.down_proj.weight"].T
    head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
    logp = torch.log_softmax(_rms(x, w["model.norm.weight"]) @ head.T / temperature, -1)
    out = torch.zeros(len(ids), dtype=torch.float64)
    for t in range(1, len(ids)):
        out[t] = logp[t - 1, ids[t]]
    return out


def _heads(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(x.shape[0], -1, HEAD_DIM)


def _rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + EPS)


def _rotate(x: torch.Tensor) -> torch.Tensor:
    # angles in float32: the rotary table is part of the model's definition
    half = HEAD_DIM // 2
    frequency = 1.0 / ROPE_THETA ** (torch.arange(0, HEAD_DIM, 2, dtype=torch.float32) / HEAD_DIM)
    angle = torch.arange(x.shape[0], dtype=torch.float32)[:, None] * frequency
    cos, sin = angle.cos().double()[:, None], angle.sin().double()[:, None]
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
