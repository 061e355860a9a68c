"""What an optimizer step says about itself, from the traces of its micro-batches.

Shapes: N loss tokens of the step, before rejection.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from shared.algo import diagnostics


@dataclass(frozen=True)
class TokenTrace:
    """Detached per-token facts of one micro-batch, over its N loss tokens."""

    log_d_N: torch.Tensor
    log_s_N: torch.Tensor
    weight_N: torch.Tensor
    adv_N: torch.Tensor
    versions_N: torch.Tensor
    seq_N: torch.Tensor
    entropy_N: torch.Tensor | None
    rejected: dict[str, torch.Tensor]
    cut: dict[str, torch.Tensor]
    truncated: torch.Tensor
    """bool[N]: a bound changed the token's weight without removing it."""
    num_segments: int


def report(
    traces: Sequence[TokenTrace],
    *,
    version_now: int,
    loss: float,
    clip_bounds: tuple[float, float] | None,
    scatter_size: int = 256,
    num_ages: int | None = None,
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Return scalars and arrays over all loss tokens of the step, before rejection.

    Scalars: `loss`, `num_loss_tokens`, `d_*`, `s_*`, `rho_*` (see
    `diagnostics.pair_summary`), `rej_*` and clip fractions, staleness, `entropy_mean`,
    `weight_mean`, and on the first minibatch `clipped_on_arrival`. Arrays: `age_count`,
    `age_k3_d_sum`, `age_k3_s_sum`, `age_k3_rho_sum` (in the first minibatch the last is
    what k3(D) would be under `current_recompute`), `scatter` f32[M, 3].
    """
    if not traces:
        raise ValueError("report: no micro-batch was trained")
    log_d_N = torch.cat([t.log_d_N for t in traces]).double()
    log_s_N = torch.cat([t.log_s_N for t in traces]).double()
    versions_N = torch.cat([t.versions_N for t in traces])
    adv_N = torch.cat([t.adv_N for t in traces])
    seq_N = torch.cat([t.seq_N + (i << 32) for i, t in enumerate(traces)])
    ages_N = (version_now - versions_N).long()
    log_rho_N = log_d_N + log_s_N
    scalars: dict[str, float] = {
        "loss": loss,
        "num_loss_tokens": float(log_d_N.numel()),
        "num_segments": float(sum(t.num_segments for t in traces)),
    }
    for name, log_N in (("d", log_d_N), ("s", log_s_N), ("rho", log_rho_N)):
        summary = diagnostics.pair_summary(log_N) | diagnostics.sequence_summary(log_N, seq_N)
        scalars |= {f"{name}_{key}": value for key, value in summary.items()}
    rejected = _joined([t.rejected for t in traces])
    scalars |= diagnostics.fractions_by_cause(rejected, _joined([t.cut for t in traces]), adv_N)
    scalars |= diagnostics.staleness(versions_N, seq_N, version_now=version_now)
    if log_d_N.numel():
        truncated_N = torch.cat([t.truncated for t in traces])
        scalars["truncated_frac"] = float(truncated_N.double().mean())
        scalars["weight_mean"] = float(torch.cat([t.weight_N for t in traces]).mean())
        entropies = [t.entropy_N for t in traces if t.entropy_N is not None]
        if entropies:
            scalars["entropy_mean"] = float(torch.cat(entropies).mean())
        if clip_bounds is not None:
            low, high = clip_bounds
            outside_N = diagnostics.outside(log_s_N, clip_low=low, clip_high=high)
            scalars["clipped_on_arrival"] = float(outside_N.double().mean())
    arrays = diagnostics.per_age(
        ages_N,
        {
            "k3_d": diagnostics.k3(log_d_N),
            "k3_s": diagnostics.k3(log_s_N),
            "k3_rho": diagnostics.k3(log_rho_N),
        },
        num_ages=num_ages,
    )
    arrays["scatter"] = diagnostics.scatter_sample(log_d_N, log_s_N, ages_N, size=scatter_size)
    return scalars, arrays


def _joined(by_cause: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {cause: torch.cat([part[cause] for part in by_cause]) for cause in by_cause[0]}
