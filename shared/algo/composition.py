"""A list of corrections as one: what is rejected, and what the rest weighs.

Order of operations (`offpolicy.md` 2), whatever the order of the list: masks from untruncated D
and the original loss mask, each blind to the others; truncation; IcePop's zeros;
self-normalisation. Nothing here sees S, and nothing carries a gradient.

Shapes: T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, assert_never

import torch

from shared.algo import corrections as on_d
from shared.algo import segments
from shared.algo.correction_list import check, spec_from, weight_of
from shared.algo.correction_specs import (
    CorrectionSpec,
    IcePop,
    Importance,
    KlMask,
    KPop,
    ProbDiff,
    SegmentMask,
    SegmentTis,
    SelfNormalise,
    SeqGeoMask,
    SeqMask,
    SeqTis,
    Tis,
    TokenMask,
    Trm,
    Unit,
    Veto,
)
from shared.algo.corrections import Layout, Verdict, WeightTotals
from shared.algo.ratios import ratio


@dataclass(frozen=True)
class _Inputs:
    log_d_T: torch.Tensor
    layout: Layout
    l_old_T: torch.Tensor | None
    l_inf_T: torch.Tensor | None
    versions_T: torch.Tensor | None

    @property
    def logprobs(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self.l_old_T is None or self.l_inf_T is None:
            raise ValueError("prob_diff and kpop compare probabilities: pass l_old_T and l_inf_T")
        return self.l_old_T, self.l_inf_T

    @property
    def versions(self) -> torch.Tensor:
        if self.versions_T is None:
            raise ValueError("segments end at version changes: pass versions_T")
        return self.versions_T


@dataclass(frozen=True)
class Composition:
    """An executable list of corrections.

    Raises:
        ValueError: at construction, for a list that `correction_list.check` refuses.
    """

    specs: tuple[CorrectionSpec, ...]

    def __post_init__(self) -> None:
        check(self.specs)

    @property
    def normalise_level(self) -> Literal["token", "sequence"] | None:
        """What the mean of the weights runs over; None: weights are not normalised."""
        for spec in self.specs:
            if isinstance(spec, SelfNormalise):
                if spec.level != "auto":
                    return spec.level
                return "sequence" if isinstance(weight_of(self.specs), SeqTis) else "token"
        return None

    def apply(
        self,
        log_d_T: torch.Tensor,
        layout: Layout,
        *,
        l_old_T: torch.Tensor | None = None,
        l_inf_T: torch.Tensor | None = None,
        versions_T: torch.Tensor | None = None,
        weight_mean: torch.Tensor | float | None = None,
    ) -> Verdict:
        """Return weights and rejections of one packed batch.

        Args:
            log_d_T: raw log D.
            layout: of the original loss mask. Where tokens outside it were dropped, its
                `index_T` is needed by the segment kinds.
            l_old_T: training-side log-probs at the behaviour version, for `prob_diff`, `kpop`.
            l_inf_T: the sampler's, for the same.
            versions_T: version stamps, for `segment_tis` and `segment_mask`.
            weight_mean: for `self_normalise`, the mean over the whole optimizer step and all
                ranks (`totals`, added up, `.mean`); None: the mean over this call.

        Raises:
            ValueError: an input is missing that a listed kind needs.
        """
        x = _Inputs(log_d_T.detach(), layout, l_old_T, l_inf_T, versions_T)
        rejected: dict[str, torch.Tensor] = {}
        for spec in self.specs:
            rejected |= _rejected(spec, x)
        weight_T, truncated_T = self._weight(x)
        if (level := self.normalise_level) is not None:
            if weight_mean is None:
                weight_mean = on_d.weight_mean(weight_T, layout, level=level)
            weight_T = on_d.self_normalise(weight_T, weight_mean)
        return Verdict(weight_T, rejected, truncated_T)

    def totals(
        self,
        log_d_T: torch.Tensor,
        layout: Layout,
        *,
        versions_T: torch.Tensor | None = None,
    ) -> WeightTotals | None:
        """Return one micro-batch's part of the mean weight; None: nothing is normalised.

        D does not depend on the current weights, so the mean over a whole optimizer step is
        known before its first forward.
        """
        if (level := self.normalise_level) is None:
            return None
        weight_T, _ = self._weight(_Inputs(log_d_T.detach(), layout, None, None, versions_T))
        return on_d.weight_totals(weight_T, layout, level=level)

    def _weight(self, x: _Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        raw_T, weight_T = _raw_and_truncated(weight_of(self.specs), x)
        truncated_T = (weight_T != raw_T) & x.layout.m_T
        for spec in self.specs:
            if isinstance(spec, IcePop):
                kept_T = on_d.token_mask(x.log_d_T, low=spec.low, high=spec.high)
                weight_T = torch.where(kept_T, weight_T, 0.0)
        return weight_T, truncated_T


def compose(specs: Sequence[CorrectionSpec | Mapping[str, Any]]) -> Composition:
    """Return the composition of a list of corrections or of their configuration entries.

    Raises:
        ValueError: an unknown kind or parameter, degenerate bounds, or a list that contradicts
            itself.
    """
    return Composition(tuple(spec_from(s) if isinstance(s, Mapping) else s for s in specs))


def _raw_and_truncated(spec: CorrectionSpec, x: _Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the untruncated ratio of the weight's unit, and W."""
    match spec:
        case Unit():
            one_T = torch.ones_like(x.log_d_T)
            return one_T, one_T
        case Tis(low=low, high=high):
            return ratio(x.log_d_T), on_d.tis_token(x.log_d_T, low=low, high=high)
        case SeqTis(high=high):
            raw_T = on_d.seq_tis(x.log_d_T, x.layout, high=float("inf"))
            return raw_T, on_d.seq_tis(x.log_d_T, x.layout, high=high)
        case SegmentTis(low=low, high=high):
            raw_T = segments.segment_ratio(x.log_d_T, x.layout, x.versions)
            return raw_T, raw_T.clamp(low, high)
        case _:
            d_T = ratio(x.log_d_T)
            return d_T, d_T


def _rejected(spec: CorrectionSpec, x: _Inputs) -> dict[str, torch.Tensor]:
    """Return the loss tokens one entry rejects, by cause; empty for weights."""
    log_d_T, layout = x.log_d_T, x.layout
    match spec:
        case Importance() | Unit() | Tis() | SeqTis() | SegmentTis() | SelfNormalise():
            return {}
        case IcePop(low=low, high=high) | TokenMask(low=low, high=high):
            return on_d.outside(log_d_T, layout, low, high)
        case SeqMask(low=low, high=high):
            cause, keep_T = "seq", on_d.seq_mask(log_d_T, layout, low=low, high=high)
        case SeqGeoMask(low=low, high=high):
            keep_T = on_d.seq_mask(log_d_T, layout, low=low, high=high, kind="geo")
            cause = "seq_geo"
        case SegmentMask(low=low, high=high):
            keep_T = segments.segment_mask(log_d_T, layout, x.versions, low=low, high=high)
            cause = "segment"
        case KlMask(estimator=estimator, agg=agg, high=high):
            keep_T = on_d.kl_mask(log_d_T, layout, high=high, estimator=estimator, agg=agg)
            cause = f"kl_{agg}_{estimator}"
        case Veto(below=below, above=above):
            keep_T = on_d.veto(log_d_T, layout, threshold=below, above=above)
            cause = "veto"
        case Trm(low=low, high=high):
            cause, keep_T = "trm", on_d.trm(log_d_T, layout, low=low, high=high)
        case ProbDiff(low=low, high=high):
            cause, keep_T = "prob_diff", on_d.prob_diff_mask(*x.logprobs, low=low, high=high)
        case KPop(high=high):
            cause, keep_T = "kpop", on_d.kpop_mask(*x.logprobs, high=high)
        case _:
            assert_never(spec)
    return {cause: ~keep_T & layout.m_T}
