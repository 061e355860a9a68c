"""A step's work as the forward takes it."""

from __future__ import annotations

import numpy as np

from services.rollout.qwen3_forward import RowGroup
from services.rollout.scheduler import Work


def laid_out(works: list[Work]) -> tuple[list[int], list[int], int]:
    """Return (packed indices of the tokens to continue, packed token ids, their number)."""
    wanted: list[int] = []
    ids: list[int] = []
    for work in works:
        if work.count == 1:
            ids.append(work.row.tokens[work.start])
        else:
            ids.extend(work.row.tokens[work.start : work.start + work.count])
        if work.samples:
            wanted.append(len(ids) - 1)
    return wanted, ids, len(ids)


def row_group(works: list[Work]) -> RowGroup:
    """Return where the tokens of one group belong."""
    return RowGroup(
        slots_R=np.array([work.row.slot for work in works], dtype=np.int64),
        starts_R=np.array([work.start for work in works], dtype=np.int64),
        counts_R=np.array([work.count for work in works], dtype=np.int64),
    )
