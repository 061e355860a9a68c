"""Routing of a mixture of experts as the sampler recorded it: from records to rows to replay.

Under `model.routing: replay` every training-side forward takes the experts that the sampler took,
ℓ^old and ℓ alike, so that a near tie between two experts that falls one way in the engine and the
other way here is not mistaken for staleness or discrepancy (rollout routing replay, arXiv
2510.11370). The weights of the chosen experts are the router's own, with gradient. A token's row is
read from the records thus:

* ℓ^old of version v: what v recorded, prefix included, because v's keys and values came from it.
* ℓ now, and routes that read no stamps: what was recorded first. Of a sampled token's own context
  row that is the version that sampled it.

Shapes: T tokens of a sequence or packed batch, L layers with experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from shared.wire.trajectory import RoutingRecord

ROUTING = "routing"
"""Key in `PackedBatch.per_token`: i16 or i32 [T, L, K], NOT_RECORDED where the router decides."""

NOT_RECORDED = -1

Rows = npt.NDArray[np.int16 | np.int32]


def routing_rows(
    records: Sequence[RoutingRecord], num_tokens: int, version: int | None = None
) -> Rows | None:
    """Return [T, L, K] of the first `num_tokens` tokens, None where nothing was recorded.

    Args:
        records: of one sequence, in the order of sampling.
        num_tokens: T; what lies beyond is left out.
        version: whose records are read; None reads all of them. The first record of a token counts.
    """
    if not records:
        return None
    layers, choices = records[0].experts.shape[1:]
    wide = any(record.experts.dtype != "u1" for record in records)
    rows_TLK = np.full(
        (num_tokens, layers, choices), NOT_RECORDED, dtype=np.int32 if wide else np.int16
    )
    for record in reversed(records):
        if version is None or record.version == version:
            stop = min(record.stop, num_tokens)
            if record.start < stop:
                experts = record.experts.numpy()
                rows_TLK[record.start : stop] = experts[: stop - record.start]
    return rows_TLK


def not_recorded(num_tokens: int, like: Rows) -> Rows:
    """Return rows that leave every token to the router, in the shape of others."""
    return np.full((num_tokens, *like.shape[1:]), NOT_RECORDED, dtype=like.dtype)
