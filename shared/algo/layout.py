"""How packed tokens belong to sequences, and sums over a sequence's loss tokens.

Shapes: T tokens of the packed batch, B sequences.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Layout:
    """Which tokens are loss tokens, and which sequence each belongs to."""

    m_T: torch.Tensor
    """bool: the original loss mask."""
    seq_T: torch.Tensor
    """i64."""
    num_sequences: int
    index_T: torch.Tensor | None = None
    """i64, ascending: where each token stands in the packed batch. Needed where tokens were
    dropped (only loss tokens kept), or runs on both sides of an environment token would be
    taken for one; None: nothing was dropped."""


def sequence_sum(values_T: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Return [B] sums over each sequence's loss tokens."""
    total_B = values_T.new_zeros(layout.num_sequences)
    return total_B.index_add(0, layout.seq_T, torch.where(layout.m_T, values_T, 0.0))


def sequence_counts(layout: Layout, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Return [B] numbers of loss tokens n_i."""
    return sequence_sum(torch.ones_like(layout.seq_T, dtype=dtype), layout)


def sequence_mean(values_T: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Return [B] means over each sequence's loss tokens; 0 for a sequence without any."""
    return sequence_sum(values_T, layout) / sequence_counts(layout, values_T.dtype).clamp(min=1.0)


def sequence_max(values_T: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Return [B] maxima over each sequence's loss tokens; 0 for a sequence without any."""
    lowest = torch.finfo(values_T.dtype).min
    masked_T = torch.where(layout.m_T, values_T, lowest)
    start_B = values_T.new_full((layout.num_sequences,), lowest)
    top_B = start_B.scatter_reduce(0, layout.seq_T, masked_T, "amax")
    return torch.where(sequence_counts(layout, values_T.dtype) > 0, top_B, 0.0)


def sequence_any(where_T: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Return bool[B]: whether any of the sequence's loss tokens has it."""
    return sequence_sum(where_T.to(torch.float64), layout) > 0
