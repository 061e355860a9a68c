"""A float64 forward of the Qwen3 architecture in numpy, for the audit.

It is an independent witness: it reads `config.json` and safetensors files and shares no code with
the services, `shared/backends` or transformers. Qwen3 only: RMSNorm, per-head q/k norm, rotary
positions, grouped-query attention, SwiGLU, dense or as a mixture of experts
(`reference_experts.py`), tied or untied head (arXiv 2505.09388).

Shapes: B queries of a chunk, L padded length, H hidden size, N heads, K key-value heads,
G = N / K, D head size, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from safetensors import deserialize

from shared.cli.reference_experts import ExpertsConfig, mix_experts

F8 = npt.NDArray[np.float64]

_CHUNK_TOKENS = 2048
"""Padded tokens per forward: small enough for the caches of one core."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a safetensors file, as stored."""

    dtype: str
    """safetensors code: F64, F32, F16, BF16."""
    shape: tuple[int, ...]
    data: bytes
    """Little-endian, C order."""

    def float64(self) -> F8:
        """Return the values, widened exactly.

        Raises:
            ValueError: a dtype that holds no weights.
        """
        if self.dtype == "BF16":
            bits = np.frombuffer(self.data, "<u2").astype(np.uint32) << 16
            return bits.view(np.float32).astype(np.float64).reshape(self.shape)
        numpy_code = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}.get(self.dtype)
        if numpy_code is None:
            raise ValueError(f"weights of dtype {self.dtype}: expected F64, F32, F16 or BF16")
        return np.frombuffer(self.data, numpy_code).astype(np.float64).reshape(self.shape)


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """Read a whole safetensors file.

    Raises:
        ValueError: missing or not a safetensors file.
    """
    try:
        # The stub of `deserialize` has no types; its result is a list of (name, fields).
        rows = cast("list[tuple[str, dict[str, Any]]]", deserialize(path.read_bytes()))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from error
    except Exception as error:  # the rust binding's error has no importable class of its own
        raise ValueError(f"{path}: not a safetensors file: {error}") from error
    return {
        name: StoredTensor(str(row["dtype"]), tuple(row["shape"]), bytes(row["data"]))
        for name, row in rows
    }


@dataclass(frozen=True, slots=True)
class ReferenceConfig:
    """What of `config.json` the forward depends on."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    tied: bool
    experts: ExpertsConfig | None = None

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> ReferenceConfig:
        """Read a Hugging Face config.

        Raises:
            ValueError: an architecture or option this forward does not implement.
        """
        rope = cast("Mapping[str, Any]", config.get("rope_parameters") or {})
        scaling = cast("Mapping[str, Any]", config.get("rope_scaling") or {})
        rope_type = rope.get("rope_type") or scaling.get("rope_type") or "default"
        layer_types = set(cast("list[str]", config.get("layer_types") or []))
        unsupported = {
            "model_type": config.get("model_type") not in ("qwen3", "qwen3_moe"),
            "rope_type": rope_type != "default",
            "hidden_act": config.get("hidden_act", "silu") != "silu",
            "use_sliding_window": bool(config.get("use_sliding_window")),
            "layer_types": bool(layer_types - {"full_attention"}),
        }
        if named := [name for name, is_so in unsupported.items() if is_so]:
            raise ValueError(
                f"the reference forward knows Qwen3 with default rotary positions only; "
                f"config.json differs in: {', '.join(named)}"
            )
        num_heads = int(config["num_attention_heads"])
        return cls(
            num_layers=int(config["num_hidden_layers"]),
            num_heads=num_heads,
            num_kv_heads=int(config.get("num_key_value_heads") or num_heads),
            head_dim=int(config.get("head_dim") or int(config["hidden_size"]) // num_heads),
            rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
            tied=bool(config.get("tie_word_embeddings", False)),
            experts=ExpertsConfig.of(config) if config["model_type"] == "qwen3_moe" else None,
        )

    @classmethod
    def read(cls, directory: Path) -> ReferenceConfig:
        """Read `config.json` of a Hugging Face directory.

        Raises:
            ValueError: missing, not JSON, or unsupported.
        """
        path = directory / "config.json"
        try:
            config = json.loads(path.read_text())
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror or error}") from error
        except ValueError as error:
            raise ValueError(f"{path}: not JSON: {error}") from error
        try:
            return cls.of(config)
        except KeyError as error:
            raise ValueError(f"{path}: key {error} is missing") from error


@dataclass(frozen=True, slots=True)
class Query:
    """Positions of one sequence whose tokens' log-probs are asked for."""

    token_ids: npt.NDArray[np.integer[Any]]
    """[T], the whole prefix included."""
    positions: npt.NDArray[np.integer[Any]]
    """[n], each in 1..T-1; the log-prob of token t is given tokens < t."""
    temperature: float = 1.0
    routing: npt.NDArray[np.integer[Any]] | None = None
    """[T, layers with experts, K]: experts to take, -1 (everywhere if None) as the router says."""


def rotary_angles(config: ReferenceConfig, length: int) -> npt.NDArray[np.float32]:
    """Return the rotary angles f4[L, F] of positions below `length`, as the model defines them.

    Frequencies and their products with positions are rounded to float32 by every implementation
    of the architecture; exact angles would be another model, off by a phase that grows with the
    position (1e-6 at position 40, which a sharp policy turns into 6e-5 nats).
    """
    halves = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    periods = (config.rope_theta ** halves.astype(np.float64)).astype(np.float32)
    frequencies = (np.float32(1.0) / periods).astype(np.float32)
    return (np.arange(length, dtype=np.float32)[:, None] * frequencies).astype(np.float32)


class ReferencePolicy:
    """One version of the policy, in float64.

    Raises:
        ValueError: a weight is missing or has no float dtype.
    """

    def __init__(self, config: ReferenceConfig, tensors: Mapping[str, StoredTensor]) -> None:
        self._config = config
        self._weights = {name: tensor.float64() for name, tensor in tensors.items()}

    def logprobs(self, queries: Sequence[Query]) -> list[F8]:
        """Return, for each query, log-probs [n] at its positions, in nats.

        Queries are padded together by length; a prefix is forwarded no further than needed.
        """
        answers: list[F8] = [np.zeros(0)] * len(queries)
        needed = [int(q.positions.max()) if len(q.positions) else 0 for q in queries]
        pending = sorted((i for i in range(len(queries)) if needed[i]), key=lambda i: -needed[i])
        while pending:
            length = needed[pending[0]]
            size = max(1, _CHUNK_TOKENS // length)
            chunk, pending = pending[:size], pending[size:]
            tokens_BL = np.zeros((len(chunk), length), dtype=np.int64)
            for row, i in enumerate(chunk):
                tokens_BL[row, : needed[i]] = queries[i].token_ids[: needed[i]]
            routing = self._routing([queries[i] for i in chunk], length)
            hidden_BLH = self._hidden(tokens_BL, routing)
            for row, i in enumerate(chunk):
                answers[i] = self._at_positions(hidden_BLH[row], queries[i])
        return answers

    def _at_positions(self, hidden_LH: F8, query: Query) -> F8:
        head_VH = self._weight(
            "model.embed_tokens.weight" if self._config.tied else "lm_head.weight"
        )
        logits_nV = hidden_LH[query.positions - 1] @ head_VH.T / query.temperature
        logits_nV -= logits_nV.max(axis=-1, keepdims=True)
        chosen_n = logits_nV[np.arange(len(query.positions)), query.token_ids[query.positions]]
        return chosen_n - np.log(np.exp(logits_nV).sum(axis=-1))

    def _routing(self, queries: Sequence[Query], length: int) -> npt.NDArray[np.int64]:
        """Return experts to take [B, L, layers, K] of a chunk, -1 where the router decides."""
        experts = self._config.experts
        layers, choices = (len(experts.layers), experts.per_token) if experts else (0, 0)
        routing = np.full((len(queries), length, layers, choices), -1, dtype=np.int64)
        for row, query in enumerate(queries):
            if query.routing is not None:
                if query.routing.shape[1:] != (layers, choices):
                    raise ValueError(
                        f"routing of {query.routing.shape[1]} layers and {query.routing.shape[2]} "
                        f"choices: the model has {layers} and {choices}"
                    )
                known = query.routing[:length]
                routing[row, : len(known)] = known
        return routing

    def _hidden(self, tokens_BL: npt.NDArray[np.int64], routing: npt.NDArray[np.int64]) -> F8:
        length = tokens_BL.shape[1]
        angles_LF = rotary_angles(self._config, length).astype(np.float64)
        rotation = (np.cos(angles_LF), np.sin(angles_LF))
        # Padding is on the right, so the causal mask alone keeps it out of every answer.
        mask_LL = np.triu(np.full((length, length), -np.inf), k=1)
        x_BLH = self._weight("model.embed_tokens.weight")[tokens_BL]
        for layer in range(self._config.num_layers):
            prefix = f"model.layers.{layer}"
            normed = self._rms_norm(x_BLH, f"{prefix}.input_layernorm")
            x_BLH = x_BLH + self._attention(normed, f"{prefix}.self_attn", rotation, mask_LL)
            normed = self._rms_norm(x_BLH, f"{prefix}.post_attention_layernorm")
            x_BLH = x_BLH + self._feed_forward(layer, normed, routing)
        return self._rms_norm(x_BLH, "model.norm")

    def _feed_forward(self, layer: int, x_BLH: F8, routing: npt.NDArray[np.int64]) -> F8:
        prefix, experts = f"model.layers.{layer}.mlp", self._config.experts
        if experts is None or layer not in experts.layers:
            return self._swiglu(x_BLH, prefix)
        recorded = routing[:, :, experts.layers.index(layer)]
        mixed_NH = mix_experts(
            experts,
            x_BLH.reshape(-1, x_BLH.shape[-1]),
            self._weight(f"{prefix}.gate.weight"),
            lambda number, x_NH: self._swiglu(x_NH, f"{prefix}.experts.{number}"),
            recorded.reshape(-1, recorded.shape[-1]),
        )
        return mixed_NH.reshape(x_BLH.shape)

    def _swiglu(self, x: F8, prefix: str) -> F8:
        gate, up = (self._linear(x, f"{prefix}.{name}_proj") for name in ("gate", "up"))
        return self._linear(_silu(gate) * up, f"{prefix}.down_proj")

    def _attention(self, x_BLH: F8, prefix: str, rotation: tuple[F8, F8], mask_LL: F8) -> F8:
        c = self._config
        batch, length, _ = x_BLH.shape

        def heads(name: str, count: int) -> F8:
            projected = self._linear(x_BLH, f"{prefix}.{name}_proj")
            return projected.reshape(batch, length, count, c.head_dim)

        q_BLND = _rotate(self._rms_norm(heads("q", c.num_heads), f"{prefix}.q_norm"), rotation)
        k_BLKD = _rotate(self._rms_norm(heads("k", c.num_kv_heads), f"{prefix}.k_norm"), rotation)
        v_BKLD = heads("v", c.num_kv_heads).transpose(0, 2, 1, 3)[:, :, None]
        groups = c.num_heads // c.num_kv_heads
        q_BKGLD = q_BLND.reshape(batch, length, c.num_kv_heads, groups, c.head_dim)
        q_BKGLD = q_BKGLD.transpose(0, 2, 3, 1, 4)
        k_BKDL = k_BLKD.transpose(0, 2, 3, 1)[:, :, None]
        scores = q_BKGLD @ k_BKDL * c.head_dim**-0.5 + mask_LL
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        scores /= scores.sum(axis=-1, keepdims=True)
        mixed = (scores @ v_BKLD).transpose(0, 3, 1, 2, 4).reshape(batch, length, -1)
        return self._linear(mixed, f"{prefix}.o_proj")

    def _rms_norm(self, x: F8, name: str) -> F8:
        scale = 1.0 / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + self._config.rms_norm_eps)
        return x * scale * self._weight(f"{name}.weight")

    def _linear(self, x: F8, name: str) -> F8:
        weight = self._weight(f"{name}.weight")
        out = (x.reshape(-1, x.shape[-1]) @ weight.T).reshape(*x.shape[:-1], weight.shape[0])
        bias = self._weights.get(f"{name}.bias")
        return out if bias is None else out + bias

    def _weight(self, name: str) -> F8:
        try:
            return self._weights[name]
        except KeyError:
            raise ValueError(f"weight {name!r} is missing from the version's file") from None


def _silu(x: F8) -> F8:
    with np.errstate(over="ignore"):
        return x / (1.0 + np.exp(-x))


def _rotate(x_BLND: F8, rotation: tuple[F8, F8]) -> F8:
    cos_LF, sin_LF = (part[None, :, None, :] for part in rotation)
    left, right = np.split(x_BLND, 2, axis=-1)
    return np.concatenate([left * cos_LF - right * sin_LF, right * cos_LF + left * sin_LF], axis=-1)
