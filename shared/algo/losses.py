"""Policy-gradient terms per token, and how they are summed to one scalar.

Shapes: T tokens, B sequences. Names as in `ratios`: log_s_T = ℓ - ℓ^old (with gradient),
weight_T = W (detached), adv_T = A.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from shared.algo.corrections import Layout, sequence_counts, sequence_sum
from shared.algo.objective import HORIZON_MODES
from shared.algo.ratios import ratio


def decoupled_ppo(
    log_s_T: torch.Tensor,
    weight_T: torch.Tensor,
    adv_T: torch.Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual: float | None = 3.0,
) -> torch.Tensor:
    """Return L_T = -W·min(S·A, clip(S, 1-clip_low, 1+clip_high)·A), dual-clipped where A < 0.

    The correction W acts on D only, the clip on S only (`offpolicy.md` 2; Hilton et al.,
    arXiv 2110.00641, with the behaviour version as the anchor; separate bounds: DAPO,
    arXiv 2503.14476). Dual clip (arXiv 1912.09729): where A < 0, L is at most -dual·A, before W.
    The gradient in ℓ is -W·A·S where not clipped and 0 where clipped.
    """
    s_T = ratio(log_s_T)
    clipped_T = s_T.clamp(1.0 - clip_low, 1.0 + clip_high)
    loss_T = -torch.minimum(s_T * adv_T, clipped_T * adv_T)
    if dual is not None:
        loss_T = torch.where(adv_T < 0, torch.minimum(loss_T, -dual * adv_T), loss_T)
    return weight_T.detach() * loss_T


def clip_causes(
    log_s_T: torch.Tensor,
    adv_T: torch.Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual: float | None,
) -> dict[str, torch.Tensor]:
    """Return where the gradient is cut, by cause: `clip_high` (A>0), `clip_low`, `dual` (A<0)."""
    s_T = ratio(log_s_T.detach())
    causes = {
        "clip_high": (adv_T > 0) & (s_T > 1.0 + clip_high),
        "clip_low": (adv_T < 0) & (s_T < 1.0 - clip_low),
    }
    if dual is not None:
        causes["dual"] = (adv_T < 0) & (s_T > dual)
    return causes


@dataclass(frozen=True)
class Denominators:
    """Global counts that the numerators are divided by, BEFORE rejection.

    Global: over all micro-batches of the optimizer step and all data-parallel ranks. Before
    rejection: tokens that a correction masks still count, so that they do not amplify the
    survivors (AReaL and slime; verl's decoupled mode and millioniron/ROLL count after). Tokens
    of zero-variance groups, over-age and unscorable tokens are not in the loss mask at all.
    """

    num_tokens: float
    """Σ of the loss mask."""
    num_sequences: float
    """Sequences with at least one loss token."""
    horizon: float = 0.0
    """The constant L of the `token_sum_*` modes."""


Aggregation = Callable[[torch.Tensor, Layout, Denominators], torch.Tensor]
"""(loss_T, already 0 where rejected; layout of the counting mask; denominators) -> scalar."""


def _token_mean(loss_T: torch.Tensor, layout: Layout, by: Denominators) -> torch.Tensor:
    return loss_T.sum() / by.num_tokens


def _seq_mean_token_sum(loss_T: torch.Tensor, layout: Layout, by: Denominators) -> torch.Tensor:
    return loss_T.sum() / by.num_sequences


def _seq_mean_token_mean(loss_T: torch.Tensor, layout: Layout, by: Denominators) -> torch.Tensor:
    counts_B = sequence_counts(layout, loss_T.dtype).clamp(min=1.0)
    return (sequence_sum(loss_T, layout) / counts_B).sum() / by.num_sequences


def _token_sum_constant(loss_T: torch.Tensor, layout: Layout, by: Denominators) -> torch.Tensor:
    return loss_T.sum() / by.horizon


def _seq_mean_constant(loss_T: torch.Tensor, layout: Layout, by: Denominators) -> torch.Tensor:
    return loss_T.sum() / (by.num_sequences * by.horizon)


AGGREGATIONS: Mapping[str, Aggregation] = {
    "token_mean": _token_mean,
    "seq_mean_token_sum": _seq_mean_token_sum,
    "seq_mean_token_mean": _seq_mean_token_mean,
    "token_sum_constant": _token_sum_constant,
    "seq_mean_constant": _seq_mean_constant,
}
"""By the name in `algo.aggregation` (`offpolicy.md` 7)."""


def aggregate(
    loss_T: torch.Tensor,
    keep_T: torch.Tensor,
    layout: Layout,
    denominators: Denominators,
    *,
    mode: str = "token_mean",
) -> torch.Tensor:
    """Sum L over kept tokens and divide by the caller's counts.

    A sequence must lie wholly inside one call. Per-sequence counts of `seq_mean_token_mean`
    come from `layout.m_T`: the original mask for denominators before rejection (what this
    project does), the kept mask, with counts to match, for denominators after it.

    Args:
        loss_T: per-token loss; values outside `keep_T` are ignored, also when not finite.
        keep_T: bool, loss tokens that survived every mask.
        layout: the mask that counts.
        denominators: global counts.
        mode: a key of `AGGREGATIONS`.

    Raises:
        ValueError: a denominator that is not positive.
    """
    needed = {"num_tokens": mode == "token_mean", "horizon": mode in HORIZON_MODES}
    needed["num_sequences"] = mode not in ("token_mean", "token_sum_constant")
    for name, used in needed.items():
        if used and not getattr(denominators, name) > 0:
            raise ValueError(f"aggregate {mode}: {name} must be positive; skip an empty step")
    return AGGREGATIONS[mode](torch.where(keep_T, loss_T, 0.0), layout, denominators)
