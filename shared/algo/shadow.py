"""Further routes beside the one that is trained on: what each would have said and decided. Pure.

On the first minibatch of a step, with the ℓ of the training forward, every shadow's ℓ̃ goes through
the same objective without gradient; its error and its decisions are held against those of the exact
route. Nothing here reaches the loss.

Shapes: T tokens of a micro-batch, N the compared loss tokens of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch

from shared.algo import diagnostics
from shared.algo.batching import PackedBatch
from shared.algo.loss_report import TokenTrace
from shared.algo.losses import Denominators
from shared.algo.objective import Objective
from shared.algo.policy_loss import Output, PolicyLoss
from shared.algo.proximal import Proxy
from shared.algo.route_health import Decisions, decision_differences, route_error

COMPARED = "compared"
"""Further per-token tensor, bool[T]: tokens of the sampled trajectories; absent, all."""


def given_key(route: str) -> str:
    """Return the name of the per-token tensor that holds what a route computed itself."""
    return f"shadow_{route}"


@dataclass(frozen=True)
class ShadowRoute:
    """Where a further route's ℓ̃ comes from."""

    name: str
    source: Literal["current", "sampler", "given"]
    """ℓ of this forward; ℓ^inf; or the per-token tensor `given_key(name)`."""
    proxy: Proxy | None = None


@dataclass(frozen=True)
class ShadowReport:
    """What the shadows of a step showed."""

    scalars: dict[str, float]
    """`shadow_<route>_<what>`: `route_error`, `decision_differences`, and the route's own ratios
    `d_k3`, `s_k3`, `rho_k3`, `s_abs_log_mean`, `clipped_on_arrival`."""
    arrays: dict[str, np.ndarray]
    """`shadow_<route>_age_<what>`: `count`, and sums of `error`, `bias` and `k3_d`."""
    by_route: dict[str, dict[str, float]]
    """The ratios above without prefix: what the route's own step would have reported."""


class ShadowLosses:
    """The shadows of one run."""

    def __init__(
        self,
        objective: Objective,
        routes: Sequence[ShadowRoute],
        *,
        trained: str,
        trained_proxy: Proxy | None = None,
        reference: str | None,
    ) -> None:
        """Compare `routes` with `reference`, the exact one: the route trained on, or a shadow.

        A trained route that is not the reference is compared too. Without a reference only the
        routes' own ratios are reported.
        """
        self.trained = trained
        self.reference = reference
        self.clip_bounds = objective.clip_bounds
        self.routes = tuple(route for route in routes if route.name != trained)
        self._losses = {r.name: PolicyLoss(objective, proxy=r.proxy) for r in self.routes}
        self._losses[trained] = PolicyLoss(objective, proxy=trained_proxy)

    def step(self, denominators: Denominators, *, version_now: int) -> ShadowStep:
        """Return what collects the first minibatch of a step."""
        return ShadowStep(self, denominators, version_now)

    def trace(
        self, name: str, output: Output, batch: PackedBatch, by: Denominators, version_now: int
    ) -> TokenTrace:
        """Return what the objective makes of a batch under one route."""
        return self._losses[name].compute(output, batch, by, version_now=version_now)[1]


@dataclass
class ShadowStep:
    """Collects the micro-batches of a step's first minibatch."""

    losses: ShadowLosses
    denominators: Denominators
    version_now: int
    _traces: dict[str, list[TokenTrace]] = field(
        default_factory=dict[str, list[TokenTrace]], init=False
    )

    @torch.no_grad()
    def observe(self, output: Output, batch: PackedBatch, trained: TokenTrace) -> None:
        """Take a micro-batch that the loss has just seen, and the trace it left."""
        name = self.losses.trained
        if (compared_T := batch.per_token.get(COMPARED)) is not None:
            mask_T = batch.per_token["loss_mask"].bool() & compared_T
            if not mask_T.any():
                return
            batch = _with(batch, loss_mask=mask_T)
            trained = self._trace(name, output, batch)
        self._traces.setdefault(name, []).append(trained)
        for route in self.losses.routes:
            old_T = _old(route, output, batch)
            if old_T is not None:
                trace = self._trace(route.name, output, _with(batch, old_logprobs=old_T))
                self._traces.setdefault(route.name, []).append(trace)

    def report(self, *, num_ages: int) -> ShadowReport:
        """Return the comparison over all micro-batches."""
        report = ShadowReport({}, {}, {})
        exact = _joined(self._traces.get(self.losses.reference or "", []))
        for name, traces in self._traces.items():
            tokens = _joined(traces)
            assert tokens is not None
            ratios = tokens.ratios(self.losses.clip_bounds)
            ages_N = (self.version_now - tokens.versions_N).long()
            k3 = {"k3_d": diagnostics.k3(tokens.log_d_N)}
            arrays: Mapping[str, np.ndarray] = diagnostics.per_age(ages_N, k3, num_ages=num_ages)
            scalars: Mapping[str, float] = {}
            if exact is not None and exact.num_tokens == tokens.num_tokens:
                errors, by_age = route_error(tokens.old_N, exact.old_N, ages_N, num_ages=num_ages)
                arrays = {**arrays, **by_age}
                scalars = errors | decision_differences(exact.decisions, tokens.decisions)
            if name != self.losses.trained:
                report.by_route[name] = ratios
            elif exact is None or name == self.losses.reference:
                continue  # its own numbers are the step's
            shown = {**ratios, **scalars}
            report.scalars.update({f"shadow_{name}_{key}": v for key, v in shown.items()})
            report.arrays.update({f"shadow_{name}_{key}": v for key, v in arrays.items()})
        return report

    def _trace(self, name: str, output: Output, batch: PackedBatch) -> TokenTrace:
        return self.losses.trace(name, output, batch, self.denominators, self.version_now)


@dataclass(frozen=True)
class _Tokens:
    """The compared tokens of a step under one route."""

    log_d_N: torch.Tensor
    log_s_N: torch.Tensor
    old_N: torch.Tensor
    versions_N: torch.Tensor
    decisions: Decisions

    @property
    def num_tokens(self) -> int:
        return self.log_d_N.numel()

    def ratios(self, clip_bounds: tuple[float, float]) -> dict[str, float]:
        low, high = clip_bounds
        outside_N = diagnostics.outside(self.log_s_N, clip_low=low, clip_high=high)
        return {
            "d_k3": float(diagnostics.k3(self.log_d_N).mean()),
            "s_k3": float(diagnostics.k3(self.log_s_N).mean()),
            "rho_k3": float(diagnostics.k3(self.log_d_N + self.log_s_N).mean()),
            "s_abs_log_mean": float(self.log_s_N.abs().mean()),
            "clipped_on_arrival": float(outside_N.double().mean()),
        }


def _joined(traces: Sequence[TokenTrace]) -> _Tokens | None:
    if not traces:
        return None
    log_d_N = torch.cat([t.log_d_N for t in traces]).cpu().double()
    l_inf_N = torch.cat([t.l_inf_N for t in traces]).cpu().double()
    rejected_N = torch.cat([_any(t.rejected, t.log_d_N) for t in traces]).cpu()
    cut_N = torch.cat([_any(t.cut, t.log_d_N) for t in traces]).cpu()
    return _Tokens(
        log_d_N=log_d_N,
        log_s_N=torch.cat([t.log_s_N for t in traces]).cpu().double(),
        old_N=l_inf_N + log_d_N,
        versions_N=torch.cat([t.versions_N for t in traces]).cpu(),
        decisions=Decisions(rejected_N, cut_N),
    )


def _any(causes: Mapping[str, torch.Tensor], like_N: torch.Tensor) -> torch.Tensor:
    if not causes:
        return torch.zeros_like(like_N, dtype=torch.bool)
    return torch.stack(list(causes.values())).any(0)


def _old(route: ShadowRoute, output: Output, batch: PackedBatch) -> torch.Tensor | None:
    """Return ℓ̃; None where the route said nothing this time."""
    match route.source:
        case "current":
            return output.logprobs_T.detach()
        case "sampler":
            return batch.per_token["sampler_logprobs"]
        case "given":
            return batch.per_token.get(given_key(route.name))


def _with(batch: PackedBatch, **tensors: torch.Tensor) -> PackedBatch:
    return replace(batch, per_token={**batch.per_token, **tensors})
