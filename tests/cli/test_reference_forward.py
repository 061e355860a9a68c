"""The audit's own forward against transformers, in float64."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.overrides import TorchFunctionMode
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from shared.cli import reference_forward
from shared.cli.reference_forward import (
    Query,
    ReferenceConfig,
    ReferencePolicy,
    StoredTensor,
    read_safetensors,
    rotary_angles,
)


class KeepFloat64(TorchFunctionMode):
    """transformers casts to float32 inside norms, softmax and rotary positions; here it may not."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if isinstance(args[0] if args else None, torch.Tensor) and args[0].is_floating_point():
            if func in (torch.Tensor.to, torch.Tensor.float) and args[0].dtype == torch.float64:
                return args[0]
            if kwargs.get("dtype") == torch.float32:
                kwargs["dtype"] = torch.float64
        elif func is torch.Tensor.float:
            return args[0].double()
        return func(*args, **kwargs)


def _model(tied: bool, **overrides: Any) -> Qwen3ForCausalLM:
    torch.manual_seed(3)
    config = Qwen3Config(
        vocab_size=37, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=12, tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0}, **overrides,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0).add_(torch.randn_like(parameter) * 0.05)
    half = torch.arange(0, 12, 2, dtype=torch.float64) / 12
    model.model.rotary_emb.inv_freq = 5000.0**-half
    return model


def _reference(model: Qwen3ForCausalLM, directory: Path) -> ReferencePolicy:
    model.config.save_pretrained(directory)
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    save_file(state, directory / "w.safetensors")
    config = ReferenceConfig.read(directory)
    return ReferencePolicy(config, read_safetensors(directory / "w.safetensors"))


def _expected(model: Qwen3ForCausalLM, token_ids: np.ndarray, temperature: float) -> np.ndarray:
    with torch.no_grad(), KeepFloat64():
        logits = model(torch.as_tensor(token_ids)[None].long()).logits[0] / temperature
        logprobs = torch.log_softmax(logits, dim=-1)
    return logprobs[np.arange(len(token_ids) - 1), token_ids[1:]].numpy()


@pytest.fixture
def exact_angles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotary angles without their float32 rounding, as `_model` computes them."""

    def angles(config: ReferenceConfig, length: int) -> np.ndarray:
        halves = np.arange(0, config.head_dim, 2) / config.head_dim
        return np.arange(length)[:, None] * config.rope_theta**-halves

    monkeypatch.setattr(reference_forward, "rotary_angles", angles)


@pytest.mark.parametrize(("head_dim", "theta"), [(24, 1e4), (64, 1e6), (128, 1e4)])
def test_rotary_angles_are_transformers_own_to_the_bit(head_dim: int, theta: float) -> None:
    config = Qwen3Config(
        head_dim=head_dim, rope_parameters={"rope_type": "default", "rope_theta": theta}
    )
    rotary = Qwen3RotaryEmbedding(config)
    assert rotary.inv_freq.dtype == torch.float32
    angles = torch.arange(100).float()[:, None] * rotary.inv_freq
    ours = rotary_angles(SimpleNamespace(head_dim=head_dim, rope_theta=theta), 100)  # type: ignore[arg-type]
    assert np.array_equal(ours, angles.numpy())


@pytest.mark.usefixtures("exact_angles")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_it_equals_transformers_in_float64(tmp_path: Path, tied: bool, attention: str) -> None:
    model = _model(tied, attn_implementation=attention)
    reference = _reference(model, tmp_path)
    rng = np.random.default_rng(0)
    queries, expected = [], []
    for length, temperature in ((40, 1.0), (7, 0.7), (23, 1.3), (2, 1.0)):
        token_ids = rng.integers(0, 37, length).astype(np.int32)
        positions = np.sort(rng.choice(np.arange(1, length), size=(length + 1) // 2, replace=False))
        queries.append(Query(token_ids, positions, temperature))
        expected.append(_expected(model, token_ids, temperature)[positions - 1])
    for got, want in zip(reference.logprobs(queries), expected, strict=True):
        assert np.abs(got - want).max() < 1e-9
        assert np.abs(want).max() > 0.5


@pytest.mark.usefixtures("exact_angles")
def test_attention_biases_are_applied(tmp_path: Path) -> None:
    model = _model(True, attention_bias=True)
    reference = _reference(model, tmp_path)
    token_ids = np.arange(11, dtype=np.int32)
    got = reference.logprobs([Query(token_ids, np.arange(1, 11))])[0]
    assert np.abs(got - _expected(model, token_ids, 1.0)).max() < 1e-9


def test_a_truncated_prefix_gives_the_same_answer(tmp_path: Path) -> None:
    reference = _reference(_model(True), tmp_path)
    token_ids = np.random.default_rng(1).integers(0, 37, 30)
    whole, cut = reference.logprobs(
        [Query(token_ids, np.array([5, 29])), Query(token_ids, np.array([5]))]
    )
    assert abs(whole[0] - cut[0]) < 1e-12


def test_no_positions_give_no_answers(tmp_path: Path) -> None:
    reference = _reference(_model(True), tmp_path)
    assert reference.logprobs([Query(np.arange(4), np.zeros(0, dtype=int))])[0].shape == (0,)


def test_bfloat16_is_widened_exactly() -> None:
    values = torch.tensor([1.0, -0.3359375, 3e38, 1e-40]).to(torch.bfloat16)
    data = values.view(torch.uint8).numpy().tobytes()
    got = StoredTensor("BF16", (4,), data).float64()
    assert np.array_equal(got, values.double().numpy())


def test_other_architectures_are_refused_by_name(tmp_path: Path) -> None:
    config = _model(True).config.to_dict() | {"model_type": "llama", "use_sliding_window": True}
    (tmp_path / "config.json").write_text(json.dumps(config, default=str))
    with pytest.raises(ValueError, match="differs in: model_type, use_sliding_window"):
        ReferenceConfig.read(tmp_path)


def test_a_missing_config_and_a_foreign_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json: No such file"):
        ReferenceConfig.read(tmp_path)
    (tmp_path / "x.safetensors").write_bytes(b"not a tensor")
    with pytest.raises(ValueError, match="not a safetensors file"):
        read_safetensors(tmp_path / "x.safetensors")
