"""Hugging Face tensors and megatron-core parameters: names, cuts and joins. Pure.

One `Entry` is one parameter of megatron-core. It holds one Hugging Face tensor or several fused
ones ([q; k; v] by key-value group, [gate; up]), cut over tensor-parallel ranks. Cutting and joining
move values without arithmetic, so that a trip there and back is bit-exact.

Names are found by suffix: local layers keep norms apart, TransformerEngine's hold them inside the
linear layer that follows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from shared.backends.megatron.layout import Shape

Cut = Literal["whole", "vocab", "rows", "columns", "qkv", "gate_up"]


@dataclass(frozen=True)
class Entry:
    """One parameter."""

    names: tuple[str, ...]
    """What megatron-core may call it; layers and experts are numbered within their rank."""
    tensors: tuple[str, ...]
    """Hugging Face names, in the order they are fused."""
    cut: Cut
    layer: int | None = None
    """None: embedding (first stage), final norm and head (last stage)."""
    expert: int | None = None
    last: bool = False
    """Outside the layers: on the last stage."""


def entries(shape: Shape) -> Iterator[Entry]:
    """Yield every parameter, in the order in which models publish them."""
    embedding = ("embedding.word_embeddings.weight",)
    yield Entry(embedding, ("model.embed_tokens.weight",), "vocab")
    for layer in range(shape.num_layers):
        yield from _layer(shape, layer)
    yield Entry(("decoder.final_layernorm.weight",), ("model.norm.weight",), "whole", last=True)
    if not shape.tied:
        yield Entry(("output_layer.weight",), ("lm_head.weight",), "vocab", last=True)


def _layer(shape: Shape, layer: int) -> Iterator[Entry]:
    ours, theirs = "decoder.layers.{layer}.", f"model.layers.{layer}."

    def entry(names: tuple[str, ...], tensors: tuple[str, ...], cut: Cut) -> Entry:
        full = tuple(theirs + name + ".weight" for name in tensors)
        return Entry(tuple(ours + name for name in names), full, cut, layer)

    attention = "self_attention."
    qkv = tuple(f"self_attn.{x}_proj" for x in "qkv")
    yield entry((attention + "linear_qkv.weight",), qkv, "qkv")
    yield entry((attention + "linear_proj.weight",), ("self_attn.o_proj",), "columns")
    if shape.qk_norm:
        yield entry((attention + "q_layernorm.weight",), ("self_attn.q_norm",), "whole")
        yield entry((attention + "k_layernorm.weight",), ("self_attn.k_norm",), "whole")
    yield entry(
        ("input_layernorm.weight", attention + "linear_qkv.layer_norm_weight"),
        ("input_layernorm",),
        "whole",
    )
    yield entry(
        ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
        ("post_attention_layernorm",),
        "whole",
    )
    if not shape.num_experts:
        yield entry(("mlp.linear_fc1.weight",), ("mlp.gate_proj", "mlp.up_proj"), "gate_up")
        yield entry(("mlp.linear_fc2.weight",), ("mlp.down_proj",), "columns")
        return
    yield entry(("mlp.router.weight",), ("mlp.gate",), "whole")
    for expert in range(shape.num_experts):
        prefix = f"{theirs}mlp.experts.{expert}."
        for number, parts in ((1, ("gate", "up")), (2, ("down",))):
            names = (
                ours + "mlp.experts.local_experts.{expert}." + f"linear_fc{number}.weight",
                ours + f"mlp.experts.linear_fc{number}.weight" + "{expert}",
            )
            tensors = tuple(f"{prefix}{part}_proj.weight" for part in parts)
            # experts are whole on their rank: expert tensor parallelism is off
            yield Entry(names, tensors, "rows" if number == 1 else "whole", layer, expert)


def hf_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Return the shape of every Hugging Face tensor."""
    hidden, q, kv = shape.hidden_size, shape.num_heads, shape.num_kv_heads
    sizes = {
        "embed_tokens": (shape.vocab_size, hidden),
        "lm_head": (shape.vocab_size, hidden),
        "q_proj": (q * shape.head_dim, hidden),
        "k_proj": (kv * shape.head_dim, hidden),
        "v_proj": (kv * shape.head_dim, hidden),
        "o_proj": (hidden, q * shape.head_dim),
        "q_norm": (shape.head_dim,),
        "k_norm": (shape.head_dim,),
        "gate": (shape.num_experts, hidden),
    }
    result: dict[str, tuple[int, ...]] = {}
    for entry in entries(shape):
        ffn = shape.ffn_size if entry.expert is None else shape.moe_ffn_size
        feed = {
            "gate_proj": (ffn, hidden),
            "up_proj": (ffn, hidden),
            "down_proj": (hidden, ffn),
        }
        for name in entry.tensors:
            kind = name.removesuffix(".weight").rpartition(".")[2]
            result[name] = feed.get(kind) or sizes.get(kind) or (hidden,)
    return result


def cut(
    entry: Entry, tensors: list[torch.Tensor], shape: Shape, rank: int, ranks: int
) -> torch.Tensor:
    """Return this tensor-parallel rank's part of the fused parameter."""
    if entry.cut in ("whole", "rows"):
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
    if entry.cut == "columns":
        return tensors[0].chunk(ranks, dim=1)[rank]
    if entry.cut == "gate_up":
        return torch.cat([tensor.chunk(ranks)[rank] for tensor in tensors])
    if entry.cut == "vocab":
        rows = shape.padded_vocab(ranks) // ranks
        mine = tensors[0][rank * rows : (rank + 1) * rows]
        padding = tensors[0].new_zeros(rows - mine.shape[0], mine.shape[1])
        return torch.cat([mine, padding])
    groups = shape.num_kv_heads
    parts = [tensor.unflatten(0, (groups, -1)) for tensor in tensors]
    return torch.cat(parts, dim=1).chunk(ranks)[rank].flatten(0, 1)


def join(entry: Entry, parts: list[torch.Tensor], shape: Shape) -> list[torch.Tensor]:
    """Return the Hugging Face tensors from all tensor-parallel ranks' parts."""
    if entry.cut == "whole":
        return [parts[0]]
    if entry.cut == "rows":
        return list(parts[0].chunk(len(entry.tensors)))
    if entry.cut == "columns":
        return [torch.cat(parts, dim=1)]
    if entry.cut == "gate_up":
        halves = [part.chunk(2) for part in parts]
        return [torch.cat([half[i] for half in halves]) for i in range(2)]
    if entry.cut == "vocab":
        return [torch.cat(parts)[: shape.vocab_size]]
    groups, per_group = shape.num_kv_heads, shape.num_heads // shape.num_kv_heads
    fused = torch.cat(parts).unflatten(0, (groups, per_group + 2, shape.head_dim))
    q, k, v = fused.split((per_group, 1, 1), dim=1)
    return [x.flatten(0, 2) for x in (q, k, v)]
