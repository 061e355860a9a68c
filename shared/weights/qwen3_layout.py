"""The layout of Qwen3, dense and mixture of experts, in an engine with vLLM's names.

Names, order and sharding are those of vLLM 0.32 (`linear.py` QKVParallelLinear and
MergedColumnParallelLinear, `vocab_parallel_embedding.py`, `fused_moe/routed_experts.py`): qkv is
[q; k; v] with whole heads per rank, a key-value head being repeated on consecutive ranks when there
are fewer heads than ranks; gate comes before up; experts are stacked; the vocabulary is padded to
64 rows before it is shared out.

This is the layout of *loaded* weights. A backend that repacks them in place afterwards (swapped
halves, shuffled tiles, emptied parameters) is refused by shape or caught by the digests. One that
computes with a packed *copy* is neither: its engine must pack again after every change.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from shared.weights.layout_parts import (
    Share,
    Source,
    box,
    fuse,
    replicate,
    shard_columns,
    shard_rows,
    shard_vocabulary,
    share_of,
    stack,
    tied_name,
)
from shared.weights.layouts import Layout, LocalTensor

EMBED = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


@dataclass(frozen=True, slots=True)
class Qwen3Shape:
    """What of a `config.json` the layout depends on."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    tied: bool
    """The head is the embedding."""
    num_experts: int = 0
    moe_intermediate_size: int = 0
    moe_layers: frozenset[int] = frozenset()

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Qwen3Shape:
        """Read a Hugging Face config of `model_type` qwen3 or qwen3_moe.

        Raises:
            ValueError: another model, a missing key, or biases.
        """
        kind = config.get("model_type")
        if kind not in ("qwen3", "qwen3_moe"):
            raise ValueError(f"model_type {kind!r} has another layout than qwen3 and qwen3_moe")
        if config.get("attention_bias"):
            raise ValueError("attention_bias is not part of this layout")
        try:
            num_layers, num_heads = config["num_hidden_layers"], config["num_attention_heads"]
            # The models' authors write the first name, transformers 5 the second.
            key = "num_local_experts" if "num_local_experts" in config else "num_experts"
            num_experts = config[key] if kind == "qwen3_moe" else 0
            dense_only = set(cast("list[int]", config.get("mlp_only_layers") or ()))
            every = config.get("decoder_sparse_step", 1)
            return cls(
                vocab_size=config["vocab_size"],
                hidden_size=config["hidden_size"],
                intermediate_size=config["intermediate_size"],
                num_layers=num_layers,
                num_heads=num_heads,
                num_kv_heads=config.get("num_key_value_heads") or num_heads,
                head_dim=config.get("head_dim") or config["hidden_size"] // num_heads,
                tied=bool(config.get("tie_word_embeddings", False)),
                num_experts=num_experts,
                moe_intermediate_size=config["moe_intermediate_size"] if num_experts else 0,
                moe_layers=frozenset(
                    layer
                    for layer in range(num_layers)
                    if num_experts and layer not in dense_only and (layer + 1) % every == 0
                ),
            )
        except KeyError as error:
            raise ValueError(f"key {error.args[0]!r} is missing") from error


@dataclass(frozen=True, slots=True)
class EngineChoices:
    """What an engine may do one way or another; the defaults are vLLM's."""

    expert_parallel: bool = False
    """Ranks hold whole experts, consecutive ones, instead of a part of each."""
    experts_name: str = "mlp.experts.routed_experts"
    """Local module of the stacked experts."""
    gate_first: bool = True
    """w13 is [gate; up]. False after vLLM's FLASHINFER_CUTLASS backend has swapped the halves."""
    vocab_multiple: int = 64
    """Rows that the vocabulary is padded to."""
    stacked_source: bool = False
    """The experts are published as `experts.gate_up_proj` [E, 2F, H] and `experts.down_proj`."""
    head_published: bool = False
    """A tied head is published under its own name, too."""


DEFAULT_CHOICES = EngineChoices()


def qwen3_layout(
    shape: Qwen3Shape, rank: int, num_ranks: int, choices: EngineChoices = DEFAULT_CHOICES
) -> Layout:
    """Return what one tensor-parallel rank holds.

    Raises:
        ValueError: heads, experts or sizes that do not divide among so many ranks.
    """
    mine = share_of(rank, num_ranks)
    hidden = shape.hidden_size
    _check_heads(shape, num_ranks)
    table = Source(EMBED, (shape.vocab_size, hidden))
    embed = shard_vocabulary(table, mine, multiple=choices.vocab_multiple)
    tensors: dict[str, LocalTensor] = {EMBED: embed}
    if shape.tied and choices.head_published:
        tensors[EMBED] = tied_name(embed, HEAD)
    elif not shape.tied:
        head = Source(HEAD, (shape.vocab_size, hidden))
        tensors[HEAD] = shard_vocabulary(head, mine, multiple=choices.vocab_multiple)
    tensors["model.norm.weight"] = replicate(Source("model.norm.weight", (hidden,)), rank)
    for layer in range(shape.num_layers):
        prefix = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            source = Source(f"{prefix}.{norm}.weight", (hidden,))
            tensors[source.name] = replicate(source, rank)
        tensors |= _attention(shape, f"{prefix}.self_attn", rank, num_ranks)
        if layer in shape.moe_layers:
            tensors |= _experts(shape, prefix, rank, num_ranks, choices)
        else:
            tensors |= _dense(shape, f"{prefix}.mlp", mine)
    return Layout(tensors)


def _check_heads(shape: Qwen3Shape, num_ranks: int) -> None:
    if shape.num_heads % num_ranks or max(num_ranks, shape.num_kv_heads) % min(
        num_ranks, shape.num_kv_heads
    ):
        raise ValueError(
            f"{shape.num_heads} heads and {shape.num_kv_heads} key-value heads do not divide "
            f"among {num_ranks} ranks"
        )


def _attention(shape: Qwen3Shape, prefix: str, rank: int, num_ranks: int) -> dict[str, LocalTensor]:
    heads = share_of(rank, num_ranks)
    kv_heads = share_of(rank, num_ranks, copies=max(1, num_ranks // shape.num_kv_heads))
    q_rows, kv_rows = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    rows = {"q_proj": q_rows, "k_proj": kv_rows, "v_proj": kv_rows}
    q, k, v = (Source(f"{prefix}.{n}.weight", (r, shape.hidden_size)) for n, r in rows.items())
    out = Source(f"{prefix}.o_proj.weight", (shape.hidden_size, q_rows))
    tensors = {
        f"{prefix}.qkv_proj.weight": fuse(
            shard_rows(q, heads), shard_rows(k, kv_heads), shard_rows(v, kv_heads)
        ),
        out.name: shard_columns(out, heads),
    }
    for norm in ("q_norm", "k_norm"):
        source = Source(f"{prefix}.{norm}.weight", (shape.head_dim,))
        tensors[source.name] = replicate(source, rank)
    return tensors


def _dense(shape: Qwen3Shape, prefix: str, mine: Share) -> dict[str, LocalTensor]:
    inner, hidden = shape.intermediate_size, shape.hidden_size
    gate, up = (Source(f"{prefix}.{name}.weight", (inner, hidden)) for name in _GATE_UP)
    down = Source(f"{prefix}.down_proj.weight", (hidden, inner))
    return {
        f"{prefix}.gate_up_proj.weight": fuse(shard_rows(gate, mine), shard_rows(up, mine)),
        down.name: shard_columns(down, mine),
    }


def _experts(
    shape: Qwen3Shape, prefix: str, rank: int, num_ranks: int, choices: EngineChoices
) -> dict[str, LocalTensor]:
    if choices.expert_parallel:
        # vLLM's linear placement: the first ranks hold one more when they do not divide.
        each, more = divmod(shape.num_experts, num_ranks)
        first = rank * each + min(rank, more)
        held, mine = range(first, first + each + (rank < more)), share_of(0, 1)
    else:
        held, mine = range(shape.num_experts), share_of(rank, num_ranks)
    if not held:
        raise ValueError(f"rank {rank} of {num_ranks} holds none of {shape.num_experts} experts")
    parts = _stacked_parts if choices.stacked_source else _expert_parts
    gate, up, down = parts(shape, f"{prefix}.mlp.experts", held, mine)
    router = Source(f"{prefix}.mlp.gate.weight", (shape.num_experts, shape.hidden_size))
    halves = (gate, up) if choices.gate_first else (up, gate)
    return {
        router.name: replicate(router, rank),
        f"{prefix}.{choices.experts_name}.w13_weight": fuse(*halves, dim=1),
        f"{prefix}.{choices.experts_name}.w2_weight": down,
    }


def _expert_parts(
    shape: Qwen3Shape, prefix: str, held: range, mine: Share
) -> tuple[LocalTensor, LocalTensor, LocalTensor]:
    """Gate and up [E, F / n, H], down [E, H, F / n], from one source per expert."""
    inner, hidden = shape.moe_intermediate_size, shape.hidden_size
    gate, up = (
        stack(
            *(
                shard_rows(Source(f"{prefix}.{e}.{name}.weight", (inner, hidden)), mine)
                for e in held
            )
        )
        for name in _GATE_UP
    )
    downs = (Source(f"{prefix}.{e}.down_proj.weight", (hidden, inner)) for e in held)
    return gate, up, stack(*(shard_columns(down, mine) for down in downs))


def _stacked_parts(
    shape: Qwen3Shape, prefix: str, held: range, mine: Share
) -> tuple[LocalTensor, LocalTensor, LocalTensor]:
    """The same from sources that are stacked already."""
    inner, hidden = shape.moe_intermediate_size, shape.hidden_size
    if inner % mine.parts:
        raise ValueError(f"{prefix}: {inner} rows do not divide by {mine.parts}")
    rows = inner // mine.parts
    first = mine.part * rows
    gate_up = Source(f"{prefix}.gate_up_proj", (shape.num_experts, 2 * inner, hidden))
    down = Source(f"{prefix}.down_proj", (shape.num_experts, hidden, inner))
    size = (len(held), rows, hidden)
    return (
        box(gate_up, (held.start, first, 0), size),
        box(gate_up, (held.start, inner + first, 0), size),
        box(down, (held.start, 0, first), (len(held), hidden, rows)),
    )


_GATE_UP = ("gate_proj", "up_proj")
