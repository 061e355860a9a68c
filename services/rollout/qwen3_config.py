"""What of a Hugging Face `config.json` the Qwen3 forward depends on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast


@dataclass(frozen=True, slots=True)
class Qwen3Config:
    """A Qwen3 (arXiv 2505.09388), dense or with experts: RMSNorm, q/k norm, RoPE, GQA, SwiGLU."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    tied: bool
    """The head is the embedding."""
    max_positions: int
    num_experts: int = 0
    experts_per_token: int = 0
    expert_size: int = 0
    """Intermediate size of one expert."""
    renormalised: bool = False
    """The weights of a token's experts are divided by their sum."""
    expert_layers: tuple[int, ...] = ()
    """Which layers have experts, ascending; the others are dense."""

    @property
    def queries_per_kv(self) -> int:
        return self.num_heads // self.num_kv_heads


def read_config(path: Path) -> Qwen3Config:
    """Read `config.json` of a Hugging Face directory.

    Raises:
        ValueError: missing, unreadable, or a model that this forward does not compute; one line.
    """
    file = path / "config.json"
    try:
        raw = json.loads(file.read_text())
    except OSError as error:
        raise ValueError(f"model {path}: no readable config.json: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{file}: not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{file}: not a JSON object")
    return parse_config(cast("dict[str, Any]", raw), origin=str(file))


def parse_config(raw: Mapping[str, Any], *, origin: str = "config.json") -> Qwen3Config:
    """Take the known keys of a config and refuse what would change the forward unseen.

    Raises:
        ValueError: another architecture, a missing key, or a feature that is not implemented.
    """
    if raw.get("model_type") not in ("qwen3", "qwen3_moe"):
        raise ValueError(
            f"{origin}: model_type {raw.get('model_type')!r}: the torch engine computes 'qwen3' "
            "and 'qwen3_moe' models only"
        )
    _refuse_features(raw, origin)
    try:
        num_heads = int(raw["num_attention_heads"])
        hidden_size = int(raw["hidden_size"])
        config = Qwen3Config(
            vocab_size=int(raw["vocab_size"]),
            hidden_size=hidden_size,
            intermediate_size=int(raw["intermediate_size"]),
            num_layers=int(raw["num_hidden_layers"]),
            num_heads=num_heads,
            num_kv_heads=int(raw.get("num_key_value_heads") or num_heads),
            head_dim=int(raw.get("head_dim") or hidden_size // num_heads),
            rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            rope_theta=_rope_theta(raw, origin),
            tied=bool(raw.get("tie_word_embeddings", False)),
            max_positions=int(raw["max_position_embeddings"]),
            **_experts(raw, origin),
        )
    except KeyError as error:
        raise ValueError(f"{origin}: key {error.args[0]!r} is missing") from error
    except (TypeError, ZeroDivisionError) as error:
        raise ValueError(f"{origin}: {error}") from error
    if config.num_heads % config.num_kv_heads or config.head_dim % 2:
        raise ValueError(
            f"{origin}: {config.num_heads} heads over {config.num_kv_heads} key-value heads of "
            f"size {config.head_dim} cannot be grouped and rotated"
        )
    return config


def _experts(raw: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Return the fields of a mixture of experts, none for a dense model."""
    # The models' authors write the first name, transformers 5 the second.
    key = "num_local_experts" if "num_local_experts" in raw else "num_experts"
    if raw["model_type"] == "qwen3" or not raw[key]:
        return {}
    num_experts, chosen = int(raw[key]), int(raw["num_experts_per_tok"])
    if not 1 <= chosen <= num_experts:
        raise ValueError(f"{origin}: num_experts_per_tok {chosen} of {num_experts} experts")
    dense_only = set(cast("list[int]", raw.get("mlp_only_layers") or ()))
    every = int(raw.get("decoder_sparse_step", 1))
    layers = range(int(raw["num_hidden_layers"]))
    return {
        "num_experts": num_experts,
        "experts_per_token": chosen,
        "expert_size": int(raw["moe_intermediate_size"]),
        "renormalised": bool(raw.get("norm_topk_prob", False)),
        "expert_layers": tuple(n for n in layers if n not in dense_only and (n + 1) % every == 0),
    }


def _refuse_features(raw: Mapping[str, Any], origin: str) -> None:
    layer_types = set(cast("list[str]", raw.get("layer_types") or ()))
    unknown = {
        "hidden_act": raw.get("hidden_act", "silu") != "silu",
        "attention_bias": bool(raw.get("attention_bias")),
        "use_sliding_window": bool(raw.get("use_sliding_window")),
        "layer_types": bool(layer_types - {"full_attention"}),
        "shared_expert_intermediate_size": bool(raw.get("shared_expert_intermediate_size")),
        "n_shared_experts": bool(raw.get("n_shared_experts")),
        "scoring_func": raw.get("scoring_func", "softmax") != "softmax",
    }
    for key, refused in unknown.items():
        if refused:
            raise ValueError(f"{origin}: {key} {raw[key]!r} is not implemented by the torch engine")


def _rope_theta(raw: Mapping[str, Any], origin: str) -> float:
    rope = cast("dict[str, Any]", raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(f"{origin}: rope type {kind!r} is not implemented by the torch engine")
    return float(rope.get("rope_theta") or raw.get("rope_theta") or 10000.0)
