"""Further routes beside the one that is trained on: what each would have said and decided. Pure.

On the first minibatch of a step, with the ℓ of the training forward, every shadow's ℓ̃ goes through
the same objective without gradient; its error and its decisions are held against those of the exact
route. Nothing here reaches the loss.

A route may lack numbers (NaN): what it says is held against the exact one where both have one.

Shapes: T tokens of a micro-batch, C the compared loss tokens, N those of them with a number.
"""

from __future__ import annotations

import hashlib
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
from shared.algo.route_health import (
    Decisions,
    decision_differences,
    route_error,
    wrong_decisions,
)

COMPARED = "compared"
"""Further per-token tensor, bool[T]: tokens of the sampled trajectories; absent, all."""

SCATTER_SIZE = 96
"""Tokens of `scatter` and `exact_scatter` per step."""


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
    """`shadow_<route>_age_<what>`, over the compared tokens that have an exact answer: `count`, and
    sums of `k3_d`, `error`, `bias` and `wrong` (decisions); of the reference `count` and `k3_d`.
    `exact_scatter`: as `scatter`, under a reference that is not the trained route."""
    by_route: dict[str, dict[str, float]]
    """The ratios above without prefix: what the route's own step would have reported."""


def is_sampled(ticket_id: str, *, seed: int, share: float) -> bool:
    """Return whether shadows look at a trajectory: the same on every replay."""
    digest = hashlib.sha256(f"shadow {seed} {ticket_id}".encode()).digest()
    return int.from_bytes(digest[:8]) < share * 2**64


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


@dataclass(frozen=True, slots=True)
class SeenTokens:
    """A micro-batch under one route."""

    trace: TokenTrace | None
    """Of the tokens that the route has a number for; None without any."""
    known_C: torch.Tensor
    """bool[C]: which of the compared tokens those are."""

    def cpu(self) -> SeenTokens:
        """Return the same on the CPU."""
        return SeenTokens(self.trace.cpu() if self.trace else None, self.known_C.cpu())


@dataclass
class ShadowStep:
    """Collects the micro-batches of a step's first minibatch."""

    losses: ShadowLosses
    denominators: Denominators
    version_now: int
    seen: list[dict[str, SeenTokens]] = field(
        default_factory=list[dict[str, "SeenTokens"]], init=False
    )
    """By micro-batch and route; {} where no token was compared."""

    @torch.no_grad()
    def observe(self, output: Output, batch: PackedBatch, trained: TokenTrace) -> None:
        """Take a micro-batch that the loss has just seen, and the trace it left."""
        self.seen.append({})
        name = self.losses.trained
        mask_T = batch.per_token["loss_mask"].bool()
        if (compared_T := batch.per_token.get(COMPARED)) is not None:
            mask_T = mask_T & compared_T
            if not mask_T.any():
                return
            batch = _with(batch, loss_mask=mask_T)
            trained = self._trace(name, output, batch)
        all_C = torch.ones(int(mask_T.sum()), dtype=torch.bool)
        self.seen[-1][name] = SeenTokens(trained, all_C)
        for route in self.losses.routes:
            old_T = _old(route, output, batch)
            if old_T is None:
                continue
            known_T = mask_T & torch.isfinite(old_T)
            trace = None
            if known_T.any():
                of_route = _with(batch, old_logprobs=old_T, loss_mask=known_T)
                trace = self._trace(route.name, output, of_route)
            self.seen[-1][route.name] = SeenTokens(trace, known_T[mask_T].cpu())

    def report(self, *, num_ages: int) -> ShadowReport:
        """Return the comparison over all micro-batches."""
        report = ShadowReport({}, {}, {})
        reference, trained = self.losses.reference, self.losses.trained
        by_route: dict[str, list[SeenTokens]] = {}
        for micro in self.seen:
            for name, tokens in micro.items():
                by_route.setdefault(name, []).append(tokens)
        exact = _joined(by_route.get(reference or "", []))
        for name, seen in by_route.items():
            tokens = _joined(seen)
            if tokens is None:
                continue
            shown = {} if name == trained == reference else tokens.ratios(self.losses.clip_bounds)
            if name != trained:
                report.by_route[name] = dict(shown)
            arrays: Mapping[str, np.ndarray] = {}
            if exact is None:
                # Nothing to compare with at this step; sums by age stay those of compared tokens.
                if reference is None and name != trained:
                    arrays = self._by_age(tokens, {}, num_ages)
            elif name == reference:
                arrays = self._by_age(tokens, {}, num_ages)
            else:
                scalars, arrays = self._differences(tokens, exact, num_ages)
                shown |= scalars
            report.scalars.update({f"shadow_{name}_{key}": v for key, v in shown.items()})
            report.arrays.update({f"shadow_{name}_{key}": v for key, v in arrays.items()})
        if exact is not None and reference != trained:
            ages_N = self._ages(exact)
            report.arrays["exact_scatter"] = diagnostics.scatter_sample(
                exact.log_d_N, exact.log_s_N, ages_N, size=SCATTER_SIZE
            )
        return report

    def _differences(
        self, tokens: _Tokens, exact: _Tokens, num_ages: int
    ) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Hold a route against the exact one on the tokens that both have a number for."""
        both_C = tokens.known_C & exact.known_C
        tokens, exact = tokens.at(both_C), exact.at(both_C)
        scalars, by_age = route_error(
            tokens.old_N, exact.old_N, self._ages(tokens), num_ages=num_ages
        )
        wrong = wrong_decisions(exact.decisions, tokens.decisions)
        wrong_N = torch.stack(list(wrong.values())).any(0).double()
        by_age |= self._by_age(tokens, {"wrong": wrong_N}, num_ages)
        return scalars | decision_differences(exact.decisions, tokens.decisions), by_age

    def _by_age(
        self, tokens: _Tokens, values: Mapping[str, torch.Tensor], num_ages: int
    ) -> dict[str, np.ndarray]:
        k3_N = diagnostics.k3(tokens.log_d_N)
        return diagnostics.per_age(self._ages(tokens), {"k3_d": k3_N, **values}, num_ages=num_ages)

    def _ages(self, tokens: _Tokens) -> torch.Tensor:
        return (self.version_now - tokens.versions_N).long()

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
    known_C: torch.Tensor
    """Which of the C compared tokens the N are."""

    def at(self, chosen_C: torch.Tensor) -> _Tokens:
        """Return those among the chosen."""
        where_N = chosen_C[self.known_C]
        return _Tokens(
            self.log_d_N[where_N],
            self.log_s_N[where_N],
            self.old_N[where_N],
            self.versions_N[where_N],
            Decisions(self.decisions.rejected_N[where_N], self.decisions.cut_N[where_N]),
            self.known_C & chosen_C,
        )

    def ratios(self, clip_bounds: tuple[float, float]) -> dict[str, float]:
        """What the route's own step would report of its ratios."""
        low, high = clip_bounds
        outside_N = diagnostics.outside(self.log_s_N, clip_low=low, clip_high=high)
        return {
            "d_k3": float(diagnostics.k3(self.log_d_N).mean()),
            "s_k3": float(diagnostics.k3(self.log_s_N).mean()),
            "rho_k3": float(diagnostics.k3(self.log_d_N + self.log_s_N).mean()),
            "s_abs_log_mean": float(self.log_s_N.abs().mean()),
            "clipped_on_arrival": float(outside_N.double().mean()),
        }


def _joined(seen: Sequence[SeenTokens]) -> _Tokens | None:
    traces = [one.trace for one in seen if one.trace is not None]
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
        known_C=torch.cat([one.known_C for one in seen]),
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
