"""Runs of loss tokens, and the corrections on D whose unit is such a run.

A *turn* is a maximal run of loss tokens: it ends at environment tokens and at the sequence's
end. A *segment* ends at version changes as well (`offpolicy.md` 9.1), because D compares two
engines at ONE version; upstream ROLL's `compute_segment_masked_mean` lets a segment run across
versions. The segment ratio is the geometric mean of D over the segment,

    R_t = exp( mean of log D over the segment of t )

(alibaba/ROLL `roll/utils/train_infer_corrections.py`, "segment"; without its 1e-8 in the
count). Sequence products over a whole multi-turn trajectory are dominated by its length, a
segment is not (`offpolicy.md` 9.6).

Shapes: T tokens of the packed batch, R runs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from shared.algo.layout import Layout
from shared.algo.ratios import ratio


@dataclass(frozen=True)
class Runs:
    """The run of every loss token."""

    run_T: torch.Tensor
    """i64: number of the run in 0..R-1 in order of appearance; -1 outside the loss mask."""

    @property
    def num_runs(self) -> int:
        """R."""
        return int(self.run_T.max()) + 1 if self.run_T.numel() else 0

    def mean(self, values_T: torch.Tensor) -> torch.Tensor:
        """Return [T]: the mean over the own run; 0 outside the loss mask."""
        inside_T = self.run_T >= 0
        index_T = self.run_T.clamp(min=0)
        zero_R = torch.zeros_like(values_T)  # R <= T: no need to wait for R on the device
        sum_R = zero_R.index_add(0, index_T, torch.where(inside_T, values_T, 0.0))
        count_R = zero_R.index_add(0, index_T, inside_T.to(values_T.dtype)).clamp(min=1.0)
        return torch.where(inside_T, (sum_R / count_R)[index_T], 0.0)

    def spread(self, values_R: torch.Tensor) -> torch.Tensor:
        """Return [T]: the own run's value on each of its tokens; 0 outside the loss mask.

        Raises:
            ValueError: not one value per run.
        """
        if values_R.shape != (self.num_runs,):
            raise ValueError(f"{list(values_R.shape)} values for {self.num_runs} runs")
        if not self.num_runs:
            return values_R.new_zeros(self.run_T.shape)
        return torch.where(self.run_T >= 0, values_R[self.run_T.clamp(min=0)], 0.0)


def turns(layout: Layout) -> Runs:
    """Number the maximal runs of loss tokens, whatever their versions."""
    return _number(layout, layout.m_T[1:] & layout.m_T[:-1])


def segments(layout: Layout, versions_T: torch.Tensor) -> Runs:
    """Number the maximal runs of loss tokens of one version.

    Args:
        layout: of the tokens.
        versions_T: behaviour version stamps; read at loss tokens only.
    """
    same_T = versions_T[1:] == versions_T[:-1]
    return _number(layout, layout.m_T[1:] & layout.m_T[:-1] & same_T)


def _number(layout: Layout, joined_T: torch.Tensor) -> Runs:
    joined_T = joined_T & (layout.seq_T[1:] == layout.seq_T[:-1])
    if layout.index_T is not None:
        joined_T = joined_T & (layout.index_T[1:] == layout.index_T[:-1] + 1)
    starts_T = layout.m_T.clone()
    starts_T[1:] &= ~joined_T
    run_T = torch.where(layout.m_T, starts_T.long().cumsum(0) - 1, -1)
    return Runs(run_T)


def segment_ratio(log_d_T: torch.Tensor, layout: Layout, versions_T: torch.Tensor) -> torch.Tensor:
    """Return R_t, the geometric mean of D over the segment of each token; 1 outside the mask."""
    return ratio(segments(layout, versions_T).mean(log_d_T.detach()))


def segment_tis(
    log_d_T: torch.Tensor,
    layout: Layout,
    versions_T: torch.Tensor,
    *,
    low: float = 0.0,
    high: float = 2.0,
) -> torch.Tensor:
    """Truncated weight of the segment, W = clamp(R, low, high) (alibaba/ROLL `weight_type`).

    Its bounds are those of token TIS: ROLL states none for segments.
    """
    return segment_ratio(log_d_T, layout, versions_T).clamp(low, high)


def segment_mask(
    log_d_T: torch.Tensor,
    layout: Layout,
    versions_T: torch.Tensor,
    *,
    low: float = 0.8,
    high: float = 1.2,
) -> torch.Tensor:
    """Keep a segment iff low <= R <= high (alibaba/ROLL filter `agg_type: segment`, 0.8-1.2)."""
    ratio_T = segment_ratio(log_d_T, layout, versions_T)
    return (ratio_T >= low) & (ratio_T <= high)
