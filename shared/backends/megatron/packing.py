"""Packed batches in megatron-core's terms."""

from __future__ import annotations

from typing import Any

import torch

from shared.algo.batching import PackedBatch
from shared.backends.megatron import core
from shared.backends.packed_attention import plan_attention


def padded(batch: PackedBatch, multiple: int) -> PackedBatch:
    """Return the batch with a sequence of zeros behind it, where its length must be a multiple.

    Sequence parallelism splits the tokens evenly. The added sequence is nobody's: it attends to
    itself, and no log-prob of it is asked for.
    """
    missing = -batch.num_tokens % multiple
    if not missing:
        return batch
    zeros_T, positions_T = batch.token_ids_T.new_zeros(missing), torch.arange(missing)
    return PackedBatch(
        token_ids_T=torch.cat([batch.token_ids_T, zeros_T]),
        positions_T=torch.cat([batch.positions_T, positions_T.to(batch.positions_T.device)]),
        lengths=(*batch.lengths, missing),
    )


def packed_params(batch: PackedBatch) -> Any:
    """Return megatron-core's description of packed sequences, with our attention's plan on it."""
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
    return params
