"""Packed batches in megatron-core's terms."""

from __future__ import annotations

from typing import Any

import torch

from shared.algo.batching import PackedBatch
from shared.backends.megatron import core
from shared.backends.packed_attention import plan_attention
from shared.backends.routing import NOT_RECORDED, ROUTING


def padded(batch: PackedBatch, multiple: int) -> PackedBatch:
    """Return the batch with a sequence of zeros behind it, where its length must be a multiple.

    Sequence parallelism splits the tokens evenly. The added sequence is nobody's: it attends to
    itself, no log-prob of it is asked for, and its experts are the router's own choice. Of what
    travels with the tokens only the routing is kept.
    """
    missing = -batch.num_tokens % multiple
    if not missing:
        return batch
    zeros_T, positions_T = batch.token_ids_T.new_zeros(missing), torch.arange(missing)
    routing_TLK, kept = batch.per_token.get(ROUTING), dict[str, torch.Tensor]()
    if routing_TLK is not None:
        nobodys_TLK = routing_TLK.new_full((missing, *routing_TLK.shape[1:]), NOT_RECORDED)
        kept[ROUTING] = torch.cat([routing_TLK, nobodys_TLK])
    return PackedBatch(
        token_ids_T=torch.cat([batch.token_ids_T, zeros_T]),
        positions_T=torch.cat([batch.positions_T, positions_T.to(batch.positions_T.device)]),
        lengths=(*batch.lengths, missing),
        per_token=kept,
    )


def packed_params(batch: PackedBatch, part: int = 0, parts: int = 1) -> Any:
    """Return megatron-core's description of packed sequences, with what our layers need on it.

    That is the attention's plan, and as `routing` the experts to take or None.

    Args:
        batch: its tokens are a multiple of `parts`.
        part: which of equal runs of tokens this rank's routers see.
        parts: how many there are.
    """
    device = batch.token_ids_T.device
    ends = torch.tensor((0, *batch.lengths), device=device).cumsum(0).int()
    params = core.packing.PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        max_seqlen_q=max(batch.lengths),
        max_seqlen_kv=max(batch.lengths),
    )
    params.plan = plan_attention(batch.lengths, device)
    routing_TLK = batch.per_token.get(ROUTING)
    params.routing = None if routing_TLK is None else routing_TLK.chunk(parts)[part]
    return params
