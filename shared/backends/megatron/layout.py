"""How a model is laid out over ranks, and whether it can be. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shared.backends.expert_layers import ExpertLayers

ARCHITECTURES = ("qwen3", "qwen3_moe", "llama")
VOCAB_MULTIPLE = 8
"""Rows of the vocabulary per tensor-parallel rank are a multiple of it; the rest is padding."""


@dataclass(frozen=True)
class Layout:
    """Ranks by what they share; data-parallel ranks are what the world leaves over."""

    tp: int = 1
    """Tensor parallel: heads, feed-forward columns and vocabulary rows."""
    pp: int = 1
    """Pipeline parallel: layers."""
    ep: int = 1
    """Expert parallel, among the data- and tensor-parallel ranks."""
    sp: bool = False
    """Sequence parallel: norms and residuals split by tokens over the tensor-parallel ranks."""

    def data_ranks(self, world: int) -> int:
        """Return the number of data-parallel ranks.

        Raises:
            ValueError: the world is no multiple of the layout, or ep does not divide what is left.
        """
        if min(self.tp, self.pp, self.ep) < 1:
            raise ValueError("layout: tp, pp and ep are at least 1")
        if world % (self.tp * self.pp):
            raise ValueError(
                f"layout: {world} ranks are no multiple of tp {self.tp} x pp {self.pp}"
            )
        left = world // (self.tp * self.pp)
        if (left * self.tp) % self.ep:
            raise ValueError(
                f"layout: ep {self.ep} does not divide the {left * self.tp} ranks of a stage"
            )
        return left


@dataclass(frozen=True)
class Shape:
    """What of a `config.json` the model and its layout depend on."""

    kind: str
    num_layers: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied: bool
    eps: float
    rope_theta: float
    max_positions: int
    num_experts: int = 0
    experts_per_token: int = 0
    moe_ffn_size: int = 0
    renormalise: bool = True
    """Whether the chosen experts' weights are made to sum to 1."""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Shape:
        """Read a Hugging Face config.

        Raises:
            ValueError: an architecture, or a part of one, that is not mapped; names it.
        """
        kind = str(config.get("model_type"))
        if kind not in ARCHITECTURES:
            raise ValueError(f"model_type {kind!r} is none of {', '.join(ARCHITECTURES)}")
        rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        refused = {
            "attention_bias": bool(config.get("attention_bias")),
            "mlp_bias": bool(config.get("mlp_bias")),
            f"rope_type {rope_type!r}": rope_type != "default",
            "use_sliding_window": bool(config.get("use_sliding_window")),
            "attention_dropout": bool(config.get("attention_dropout")),
            f"hidden_act {config.get('hidden_act')!r}": config.get("hidden_act", "silu") != "silu",
            "mlp_only_layers": bool(config.get("mlp_only_layers")),
            "decoder_sparse_step": config.get("decoder_sparse_step", 1) != 1,
        }
        for what, present in refused.items():
            if present:
                raise ValueError(f"{what} is not mapped to megatron-core")
        try:
            heads = int(config["num_attention_heads"])
            moe = kind == "qwen3_moe"
            # transformers 5 writes the second name, the models' authors the first
            experts = config.get("num_experts", config.get("num_local_experts"))
            if moe and experts is None:
                raise KeyError("num_experts")
            return cls(
                kind=kind,
                num_layers=int(config["num_hidden_layers"]),
                hidden_size=int(config["hidden_size"]),
                ffn_size=int(config["intermediate_size"]),
                num_heads=heads,
                num_kv_heads=int(config.get("num_key_value_heads") or heads),
                head_dim=int(config.get("head_dim") or config["hidden_size"] // heads),
                vocab_size=int(config["vocab_size"]),
                tied=bool(config.get("tie_word_embeddings", False)),
                eps=float(config["rms_norm_eps"]),
                rope_theta=float(rope.get("rope_theta") or config.get("rope_theta", 10_000.0)),
                max_positions=int(config["max_position_embeddings"]),
                num_experts=int(experts or 0) if moe else 0,
                experts_per_token=int(config["num_experts_per_tok"]) if moe else 0,
                moe_ffn_size=int(config["moe_intermediate_size"]) if moe else 0,
                renormalise=bool(config.get("norm_topk_prob", False)) if moe else True,
            )
        except KeyError as error:
            raise ValueError(f"config.json has no {error.args[0]}") from error

    @property
    def qk_norm(self) -> bool:
        """Whether queries and keys are normalised per head."""
        return self.kind != "llama"

    @property
    def expert_layers(self) -> ExpertLayers | None:
        """Its routers; every layer has one, or none has."""
        if not self.num_experts:
            return None
        return ExpertLayers(self.num_layers, self.experts_per_token, self.num_experts)

    def padded_vocab(self, tp: int) -> int:
        """Return the rows of embedding and head in memory, over all ranks."""
        multiple = VOCAB_MULTIPLE * tp
        return -(-self.vocab_size // multiple) * multiple

    def check(self, layout: Layout) -> None:
        """Refuse a layout that does not divide the model.

        Raises:
            ValueError: names what is not divided by what.
        """
        counts = [
            ("num_attention_heads", self.num_heads, "tp", layout.tp),
            ("num_key_value_heads", self.num_kv_heads, "tp", layout.tp),
            ("intermediate_size", self.ffn_size, "tp", layout.tp),
            ("num_hidden_layers", self.num_layers, "pp", layout.pp),
        ]
        if self.num_experts:
            counts.append(("num_experts", self.num_experts, "ep", layout.ep))
        elif layout.ep > 1:
            raise ValueError(f"layout: ep {layout.ep}, but model_type {self.kind} has no experts")
        for name, count, axis, ranks in counts:
            if count % ranks:
                raise ValueError(f"layout: {axis} {ranks} does not divide {name} {count}")
        rows = self.padded_vocab(layout.tp) // layout.tp
        if rows * (layout.tp - 1) >= self.vocab_size:
            raise ValueError(
                f"layout: tp {layout.tp} leaves its last rank without a row of vocab_size "
                f"{self.vocab_size}"
            )
        if layout.sp and layout.tp == 1:
            raise ValueError("layout: sp needs tp above 1")
        if self.num_experts and layout.tp > 1 and not layout.sp:
            # megatron-core does not train it: every rank would compute all tokens' experts
            raise ValueError(f"layout: experts with tp {layout.tp} need sp: set it to true")
