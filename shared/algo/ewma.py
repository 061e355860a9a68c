"""The EWMA anchor on tensors: θ̄ in fp32 master precision, one tensor at a time.

`ewma_control` decides λ; this file applies it and measures what the decision needs. Memory: one
more copy of the weights, in float32 also for bf16 models, because a bf16 average loses its
increments (one Adam step at lr 1e-6 changes 1.7 % of bf16-rounded weights).

Sources: arXiv 2110.00641 and openai/ppo-ewma `EwmaModel`; see `ewma_control`. Shapes: T tokens,
M anchors of a bank.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from shared.algo.diagnostics import k3
from shared.algo.ewma_control import AnchorMeasured
from shared.algo.logprobs import wide
from shared.algo.ratios import log_ratio

BANK_CENTERS = (1.0, 2.0, 4.0, 8.0)
"""Centres of mass of a bank of fixed-β anchors (`nearest_anchor`)."""

Named = Iterable[tuple[str, torch.Tensor]]


def start_anchor(
    current: Named, *, device: torch.device | str | None = None
) -> dict[str, torch.Tensor]:
    """Return θ̄ = θ: copies in float32 (float64 stays), other dtypes as they are."""
    anchor: dict[str, torch.Tensor] = {}
    for name, value in current:
        fixed = value.detach()
        dtype = wide(fixed[:0].flatten()).dtype if fixed.is_floating_point() else fixed.dtype
        anchor[name] = fixed.to(device=device or fixed.device, dtype=dtype, copy=True)
    return anchor


def blend(anchor: Mapping[str, torch.Tensor], current: Named, keep: float) -> None:
    """Set θ̄ ← keep·θ̄ + (1-keep)·θ in place, tensor by tensor.

    keep = 0 copies and keep = 1 does nothing, both exactly; where θ equals θ̄ it stays bit-equal.
    Tensors that are not floating point (counters, buffers) are copied unless keep is 1.

    Raises:
        ValueError: keep outside [0, 1], or `current` lacks tensors of the anchor or has others.
    """
    if not 0 <= keep <= 1:
        raise ValueError(f"keep: {keep} is not in [0, 1]")
    seen: set[str] = set()
    with torch.no_grad():
        for name, value in current:
            seen.add(name)
            if name not in anchor or anchor[name].shape != value.shape:
                raise ValueError(f"blend: the anchor has no {name!r} of shape {list(value.shape)}")
            if keep == 1:
                continue
            mean = anchor[name]
            if keep == 0 or not mean.is_floating_point():
                mean.copy_(value)
            else:
                mean.lerp_(value.detach().to(device=mean.device, dtype=mean.dtype), 1.0 - keep)
    if missing := sorted(anchor.keys() - seen):
        raise ValueError(f"blend: no current value of {', '.join(missing)}")


def nearest_anchor(ages_T: torch.Tensor, anchor_ages_M: torch.Tensor) -> torch.Tensor:
    """Return i64[T]: for each token the anchor whose mean age is nearest, the younger at a tie.

    With M anchors a batch costs M forwards and approaches snapshots.
    """
    ages_M, order_M = torch.sort(anchor_ages_M.double())
    gap_TM = (ages_T.double()[:, None] - ages_M[None, :]).abs()
    return order_M[gap_TM.argmin(dim=1)]


def behaviour_age(
    versions_T: torch.Tensor,
    *,
    version_now: int,
    steps_per_version: int = 1,
    steps_since_publish: int = 0,
) -> torch.Tensor:
    """Return s_t = K·a_t + k: age of each token in optimizer steps.

    Args:
        versions_T: stamps.
        version_now: the learner's version.
        steps_per_version: K, optimizer steps per publish.
        steps_since_publish: k < K, steps the learner is ahead of `version_now`.
    """
    return (steps_per_version * (version_now - versions_T) + steps_since_publish).double()


def target_age(ages_T: torch.Tensor, m_T: torch.Tensor, *, trim: float = 0.0) -> float:
    """Return s̄, the mean age of the loss tokens; 0 for none.

    Args:
        ages_T: from `behaviour_age`.
        m_T: loss mask.
        trim: share of the tokens left out at either end, for batches with a long tail.

    Raises:
        ValueError: trim outside [0, 0.5).
    """
    if not 0 <= trim < 0.5:
        raise ValueError(f"trim: {trim} is not in [0, 0.5)")
    ages_N = ages_T[m_T.bool()].double()
    if ages_N.numel() == 0:
        return 0.0
    cut = int(trim * ages_N.numel())
    kept_N = ages_N.sort().values[cut : ages_N.numel() - cut]
    return float(kept_N.mean().clamp(min=0.0))


def measure_anchor(
    l_start_T: torch.Tensor,
    l_anchor_T: torch.Tensor,
    l_inf_T: torch.Tensor,
    m_T: torch.Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> AnchorMeasured:
    """Return what the resets R2 and R3 look at, over loss tokens with finite log-probs.

    Args:
        l_start_T: ℓ at the first minibatch of the step.
        l_anchor_T: log-prob under θ̄, from the forward that the route pays anyway.
        l_inf_T: ℓ^inf.
        m_T: loss mask.
        clip_low: of the clip on S̃.
        clip_high: likewise.
    """
    start_T, anchor_T, inf_T = (x.detach() for x in (l_start_T, l_anchor_T, l_inf_T))
    use_T = m_T.bool() & torch.isfinite(wide(start_T) + wide(anchor_T) + wide(inf_T))
    start_N, anchor_N, inf_N = (x[use_T].double() for x in (start_T, anchor_T, inf_T))
    if start_N.numel() == 0:
        return AnchorMeasured()
    log_s_N = log_ratio(start_N, anchor_N)
    s_N = torch.exp(log_s_N)
    outside_N = (s_N < 1.0 - clip_low) | (s_N > 1.0 + clip_high)
    return AnchorMeasured(
        k3_anchor=float(k3(anchor_N - inf_N).mean()),
        k3_start=float(k3(start_N - inf_N).mean()),
        drift_k3=float(k3(log_s_N).mean()),
        drift_abs_log=float(log_s_N.abs().mean()),
        clipped=float(outside_N.double().mean()),
    )
