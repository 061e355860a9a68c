"""What an optimizer step says about itself, from the traces of its micro-batches.

Shapes: N loss tokens of the step, before rejection.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from shared.algo import diagnostics
from shared.algo.route_health import noise_floor
from shared.algo.sampler_agreement import sampler_agreement

BY_MINIBATCH = ("s_mean", "s_abs_log_mean", "s_k3", "clip_high", "clip_low", "contributing")
"""What each minibatch of a step says of its own: S has moved since the first."""


@dataclass(frozen=True)
class TokenTrace:
    """Detached per-token facts of one micro-batch, over its N loss tokens."""

    log_d_N: torch.Tensor
    log_s_N: torch.Tensor
    l_inf_N: torch.Tensor
    """ℓ^inf; 0 where a ratio is not finite."""
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

    def cpu(self) -> TokenTrace:
        """Return the same on the CPU."""
        return TokenTrace(
            log_d_N=self.log_d_N.cpu(),
            log_s_N=self.log_s_N.cpu(),
            l_inf_N=self.l_inf_N.cpu(),
            weight_N=self.weight_N.cpu(),
            adv_N=self.adv_N.cpu(),
            versions_N=self.versions_N.cpu(),
            seq_N=self.seq_N.cpu(),
            entropy_N=None if self.entropy_N is None else self.entropy_N.cpu(),
            rejected={cause: values_N.cpu() for cause, values_N in self.rejected.items()},
            cut={cause: values_N.cpu() for cause, values_N in self.cut.items()},
            truncated=self.truncated.cpu(),
            num_segments=self.num_segments,
        )


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
    `diagnostics.pair_summary`, `diagnostics.sequence_summary`, `diagnostics.prob_difference`),
    `rej_*` and clip fractions, staleness, `entropy_mean`, weights (`diagnostics.weight_summary`),
    `d_k3_age_*` (`diagnostics.age_slope`), and on the first minibatch `clipped_on_arrival`,
    `noise_floor`, and `sampler_*` and `fresh_*`: `sampler_agreement` of all tokens and of those
    of age 0. Arrays: `age_count`, `age_k3_d_sum`, `age_k3_s_sum`, `age_k3_rho_sum` (in the first
    minibatch the last is what k3(D) would be under `current_recompute`), `scatter` f32[M, 3], and
    on the first minibatch `age_s_abs_log_p99`.
    """
    if not traces:
        raise ValueError("report: no micro-batch was trained")
    # One copy each to the CPU: small tensors, of which a GPU would only wait.
    log_d_N = torch.cat([t.log_d_N for t in traces]).cpu().double()
    log_s_N = torch.cat([t.log_s_N for t in traces]).cpu().double()
    l_inf_N = torch.cat([t.l_inf_N for t in traces]).cpu().double()
    weight_N = torch.cat([t.weight_N for t in traces]).cpu()
    versions_N = torch.cat([t.versions_N for t in traces]).cpu()
    adv_N = torch.cat([t.adv_N for t in traces]).cpu()
    seq_N = torch.cat([t.seq_N + (i << 32) for i, t in enumerate(traces)]).cpu()
    ages_N = (version_now - versions_N).long()
    log_rho_N = log_d_N + log_s_N
    l_old_N = l_inf_N + log_d_N
    scalars: dict[str, float] = {
        "loss": loss,
        "num_loss_tokens": float(log_d_N.numel()),
        "num_segments": float(sum(t.num_segments for t in traces)),
    }
    for name, log_N, l_p_N in (
        ("d", log_d_N, l_inf_N),
        ("s", log_s_N, l_old_N),
        ("rho", log_rho_N, l_inf_N),
    ):
        summary = {
            **diagnostics.pair_summary(log_N),
            **diagnostics.sequence_summary(log_N, seq_N),
            **diagnostics.prob_difference(l_p_N + log_N, l_p_N),
        }
        scalars |= {f"{name}_{key}": value for key, value in summary.items()}
    rejected = _joined([t.rejected for t in traces])
    scalars |= diagnostics.fractions_by_cause(rejected, _joined([t.cut for t in traces]), adv_N)
    scalars |= diagnostics.staleness(versions_N, seq_N, version_now=version_now)
    if log_d_N.numel():
        truncated_N = torch.cat([t.truncated for t in traces]).cpu()
        kept_N = ~torch.stack(list(rejected.values())).any(0)
        scalars |= diagnostics.weight_summary(log_d_N[kept_N], weight_N[kept_N])
        scalars["truncated_frac"] = float(truncated_N.double().mean())
        scalars["weight_mean"] = float(weight_N.mean())
        entropies = [t.entropy_N for t in traces if t.entropy_N is not None]
        if entropies:
            scalars["entropy_mean"] = float(torch.cat(entropies).mean())
    arrays = diagnostics.per_age(
        ages_N,
        {
            "k3_d": diagnostics.k3(log_d_N),
            "k3_s": diagnostics.k3(log_s_N),
            "k3_rho": diagnostics.k3(log_rho_N),
        },
        num_ages=num_ages,
    )
    slope = diagnostics.age_slope(arrays["age_count"], arrays["age_k3_d_sum"])
    scalars |= {f"d_k3_age_{name}": value for name, value in slope.items()}
    arrays["scatter"] = diagnostics.scatter_sample(log_d_N, log_s_N, ages_N, size=scatter_size)
    if clip_bounds is not None and log_d_N.numel():
        scalars |= _on_arrival(log_d_N, log_s_N, l_inf_N, ages_N, clip_bounds)
        arrays["age_s_abs_log_p99"] = diagnostics.quantile_by_age(
            ages_N, log_s_N.abs(), 0.99, num_ages=num_ages
        )
    return scalars, arrays


def by_minibatch(
    before: Mapping[str, np.ndarray], scalars: Mapping[str, float]
) -> dict[str, np.ndarray]:
    """Return `minibatch_<name>` of `BY_MINIBATCH`, f64[minibatches], one longer than before.

    NaN where a minibatch does not report the name.
    """
    none = np.zeros(0)
    return {
        f"minibatch_{name}": np.append(
            before.get(f"minibatch_{name}", none), scalars.get(name, np.nan)
        )
        for name in BY_MINIBATCH
    }


def _on_arrival(
    log_d_N: torch.Tensor,
    log_s_N: torch.Tensor,
    l_inf_N: torch.Tensor,
    ages_N: torch.Tensor,
    clip_bounds: tuple[float, float],
) -> dict[str, float]:
    """Return what only the first minibatch shows, before any optimizer step."""
    low, high = clip_bounds
    outside_N = diagnostics.outside(log_s_N, clip_low=low, clip_high=high)
    found = {"clipped_on_arrival": float(outside_N.double().mean())}
    floor = noise_floor(log_s_N, ages_N)
    if floor is not None:
        found["noise_floor"] = floor
    fresh_N = ages_N == 0
    for name, where_N in (("sampler", fresh_N | True), ("fresh", fresh_N)):
        agreement = sampler_agreement(log_d_N[where_N], l_inf_N[where_N])
        found |= {f"{name}_{key}": value for key, value in agreement.items()}
    return found


def _joined(by_cause: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {cause: torch.cat([part[cause] for part in by_cause]).cpu() for cause in by_cause[0]}
