"""The training objective as one object: per-token tensors and a forward in, a scalar out.

A training step, with `backend` a `shared.backends.base.Backend`:

    algo: AlgoSection = config.learner.algo                       # validated at start
    policy_loss = PolicyLoss(algo.objective())                    # once

    micros = [pack(token_ids, per_token={...}), ...]              # see PER_TOKEN below
    for minibatch in split_into_minibatches(micros):              # one optimizer step each
        step = policy_loss.minibatch(count(minibatch, horizon), version_now=v, first=...)
        for micro in minibatch:                                   # gradients accumulate
            backend.forward_backward(
                micro, step, temperature=tau, with_entropy=policy_loss.needs_entropy
            )
        grad_norm = backend.step(lr, max_grad_norm=...)
        scalars, arrays = step.report()                           # detached, for the StepReport

`count` takes ALL micro-batches of the optimizer step (over all data-parallel ranks: add the
counts), before any rejection. `version_now` is the version the step starts from; a token's age
is version_now - versions. A step without loss tokens is skipped by the caller.

Order of operations (`offpolicy.md` 2): ratios from raw log-probs; masks from untruncated D and
the original loss mask; truncation of D to W; PPO term from S; dual clip; multiply; aggregate.

Shapes: T tokens of a micro-batch, N its loss tokens, B sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from shared.algo import diagnostics
from shared.algo.batching import PackedBatch
from shared.algo.composition import compose
from shared.algo.corrections import Layout, Verdict, WeightTotals
from shared.algo.kl import kl_terms
from shared.algo.loss_report import TokenTrace, report
from shared.algo.loss_terms import Terms, Tokens
from shared.algo.losses import Denominators, aggregate
from shared.algo.objective import Objective
from shared.algo.objective_terms import objective_terms
from shared.algo.proximal import Proxy, alpha_by_age, linear_proxy, loglinear_proxy
from shared.algo.ratios import split

PER_TOKEN = ("loss_mask", "old_logprobs", "sampler_logprobs", "advantages", "versions")
"""Required in `PackedBatch.per_token`, each [T]: m (bool or 0/1), ℓ^old, ℓ^inf, A, and the i64
stamp v. All but the mask are read only where it is 1. Optional `trajectory` i64: tokens of one
trajectory share a number inside the micro-batch; absent, each sequence is one."""


REFERENCE = "reference_logprobs"
"""Further per-token tensor, f32[T], where `algo.kl` is on: log-probs of the reference model.
Another is `scores`: the raw reward of the token's trajectory, which `topr` needs."""

PROX = "prox_logprobs"
"""Further per-token tensor, f32[T], under objective four_policy: log-probs of its anchor."""

PROXIES = {"loglinear": loglinear_proxy, "linear": linear_proxy}


class Output(Protocol):
    """What the loss needs of a forward (`shared.backends.base.ForwardOutput`)."""

    @property
    def logprobs_T(self) -> torch.Tensor: ...
    @property
    def entropy_T(self) -> torch.Tensor | None: ...


def count(batches: Sequence[PackedBatch], horizon: float | None = None) -> Denominators:
    """Count loss tokens and sequences (trajectories) of an optimizer step, before rejection."""
    tokens = sequences = 0
    for batch in batches:
        mask_T = batch.per_token["loss_mask"].bool()
        tokens += int(mask_T.sum())
        sequences += int(torch.unique(trajectory_of(batch)[mask_T]).numel())
    return Denominators(float(tokens), float(sequences), horizon or 0.0)


def trajectory_of(batch: PackedBatch) -> torch.Tensor:
    """Return i64[T]: the trajectory (by default the sequence) each token belongs to."""
    given = batch.per_token.get("trajectory")
    if given is not None:
        return given
    lengths_B = torch.tensor(batch.lengths, device=batch.token_ids_T.device)
    index_B = torch.arange(len(batch.lengths), device=lengths_B.device)
    return torch.repeat_interleave(index_B, lengths_B)


class PolicyLoss:
    """Decoupled PPO with a correction on D and a clip on S, as configured."""

    def __init__(self, objective: Objective, *, proxy: Proxy | None = None) -> None:
        """Optimise `objective`; with a `proxy`, ℓ^old is computed from ℓ^inf, ℓ and the age."""
        self.objective = objective
        self.proxy: Proxy | None = proxy
        self._composition = compose(objective.corrections)

    @property
    def needs_reference(self) -> bool:
        """Whether batches must carry `reference_logprobs`."""
        return self.objective.kl.coefficient > 0

    @property
    def needs_entropy(self) -> bool:
        """Whether the forward must return entropies."""
        return self.objective.entropy_bonus > 0

    def minibatch(
        self,
        denominators: Denominators,
        *,
        version_now: int,
        first: bool = True,
        weight_mean: float | None = None,
    ) -> MinibatchLoss:
        """Return the loss function of one optimizer step.

        Args:
            denominators: of the whole optimizer step (`count`).
            version_now: the version the batch is trained from.
            first: whether nothing was stepped since `version_now` was published; the share of
                tokens outside the clip is then `clipped_on_arrival`.
            weight_mean: see `weight_mean`.
        """
        return MinibatchLoss(
            self, denominators, version_now=version_now, first=first, weight_mean=weight_mean
        )

    def weight_mean(self, batches: Sequence[PackedBatch]) -> float | None:
        """Return the mean weight of an optimizer step, None where weights are not normalised.

        D does not depend on the current weights, unless a proxy stands for ℓ^old: then every
        micro-batch is normalised by its own mean.
        """
        if self._composition.normalise_level is None or self.proxy is not None:
            return None
        totals: WeightTotals | None = None
        for batch in batches:
            mask_T = batch.per_token["loss_mask"].bool()
            rows_N = mask_T.nonzero()[:, 0]
            if not len(rows_N):
                continue
            old_N, inf_N, _, versions_N = (batch.per_token[n][rows_N] for n in PER_TOKEN[1:])
            all_N = torch.ones_like(rows_N, dtype=torch.bool)
            log_d_N = split(old_N, old_N, inf_N, all_N).log_d_T
            layout = Layout(all_N, *_renumber(trajectory_of(batch)[rows_N]), index_T=rows_N)
            part = self._composition.totals(log_d_N, layout, versions_T=versions_N)
            totals = part if totals is None or part is None else totals + part
        return None if totals is None else float(totals.mean)

    def _kl(
        self, tokens: Tokens, batch: PackedBatch, rows_N: torch.Tensor, by: Denominators
    ) -> torch.Tensor:
        """Return coefficient · KL to the reference, on every loss token, rejected or not."""
        if REFERENCE not in batch.per_token:
            raise ValueError(f"algo.kl is set: the batch lacks per-token {REFERENCE}")
        kl = self.objective.kl
        log_weight_N = {
            "none": None,
            "staleness": tokens.log_ratio("old"),
            "total": tokens.log_ratio("rollout"),
        }[kl.importance]
        terms = kl_terms(
            tokens.l_T,
            batch.per_token[REFERENCE][rows_N],
            estimator=kl.estimator,
            log_weight_T=log_weight_N,
            value_clamp=kl.value_clamp,
            input_clamp=kl.input_clamp,
        )
        mode = self.objective.aggregation
        mean = aggregate(terms.loss_T, tokens.layout.m_T, tokens.layout, by, mode=mode)
        return kl.coefficient * mean

    def compute(
        self,
        output: Output,
        batch: PackedBatch,
        denominators: Denominators,
        *,
        version_now: int = 0,
        weight_mean: float | None = None,
    ) -> tuple[torch.Tensor, TokenTrace]:
        """Return the scalar loss of a micro-batch and what it did to each loss token.

        Args:
            output: the forward's.
            batch: with the `PER_TOKEN` tensors.
            denominators: of the whole optimizer step.
            version_now: the version the batch is trained from.
            weight_mean: of the whole optimizer step, where weights are normalised; None: of
                this micro-batch.

        Raises:
            ValueError: a per-token tensor is missing, or entropies are needed and absent.
        """
        missing = [name for name in PER_TOKEN if name not in batch.per_token]
        if missing:
            raise ValueError(f"the batch lacks per-token {', '.join(missing)}")
        want = self.objective
        mask_T = batch.per_token["loss_mask"].bool()
        rows_N = mask_T.nonzero()[:, 0]
        old_N, inf_N, adv_N, versions_N = (batch.per_token[n][rows_N] for n in PER_TOKEN[1:])
        all_N = torch.ones_like(rows_N, dtype=torch.bool)
        now_N = output.logprobs_T[rows_N]
        if self.proxy is not None:
            alpha_N = alpha_by_age(version_now - versions_N, versions_N)
            old_N = PROXIES[self.proxy](now_N, inf_N, alpha_N)
        ratios = split(now_N, old_N, inf_N, all_N)
        layout = Layout(all_N, *_renumber(trajectory_of(batch)[rows_N]), index_T=rows_N)
        adv_N = adv_N.to(ratios.log_s_T.dtype)

        verdict = self._composition.apply(
            ratios.log_d_T,
            layout,
            l_old_T=old_N,
            l_inf_T=inf_N,
            versions_T=versions_N,
            weight_mean=weight_mean,
        )
        rejected = {**verdict.rejected, "nonfinite": ~ratios.finite_T}
        score_T, prox_T = batch.per_token.get("scores"), batch.per_token.get(PROX)
        prox_N = None if prox_T is None else prox_T[rows_N]
        if prox_N is not None:
            rejected["nonfinite"] = rejected["nonfinite"] | ~torch.isfinite(prox_N)
        keep_N = ~torch.stack(list(rejected.values())).any(0)
        tokens = Tokens.of(
            now_N,
            old_N,
            inf_N,
            adv_N,
            verdict.weight_T,
            layout,
            None if score_T is None else score_T[rows_N],
            prox_N,
        )
        terms = objective_terms(tokens, want.objective)
        loss = aggregate(terms.loss_T, keep_N, layout, denominators, mode=want.aggregation)
        if want.kl.coefficient:
            loss = loss + self._kl(tokens, batch, rows_N, denominators)
        entropy_N = None if output.entropy_T is None else output.entropy_T[rows_N]
        if self.needs_entropy:
            if entropy_N is None:
                raise ValueError("entropy_bonus is set: run the forward with_entropy=True")
            bonus = aggregate(entropy_N, all_N, layout, denominators, mode=want.aggregation)
            loss = loss - want.entropy_bonus * bonus
        trace = TokenTrace(
            log_d_N=ratios.log_d_T,
            log_s_N=ratios.log_s_T.detach(),
            l_inf_N=torch.where(ratios.finite_T, inf_N, 0.0),
            weight_N=verdict.weight_T,
            adv_N=adv_N,
            versions_N=versions_N,
            seq_N=layout.seq_T,
            entropy_N=None if entropy_N is None else entropy_N.detach(),
            rejected=rejected,
            cut=dict(terms.cut),
            truncated=_truncated(verdict, terms, all_N),
            num_segments=diagnostics.segments(
                batch.per_token["versions"], mask_T, batch.positions_T
            ),
        )
        return loss, trace


def _renumber(seq_N: torch.Tensor) -> tuple[torch.Tensor, int]:
    distinct, index_N = torch.unique(seq_N, return_inverse=True)
    return index_N, int(distinct.numel())


@dataclass
class MinibatchLoss:
    """A `LossFn` for every micro-batch of one optimizer step, and its report."""

    policy_loss: PolicyLoss
    denominators: Denominators
    version_now: int
    first: bool
    weight_mean: float | None = None
    traces: list[TokenTrace] = field(default_factory=list[TokenTrace], init=False)
    losses: list[float] = field(default_factory=list[float], init=False)
    """Of the micro-batches, as the traces."""

    def __call__(self, output: Output, batch: PackedBatch) -> torch.Tensor:
        """Return the scalar to differentiate."""
        loss, trace = self.policy_loss.compute(
            output,
            batch,
            self.denominators,
            version_now=self.version_now,
            weight_mean=self.weight_mean,
        )
        self.traces.append(trace)
        self.losses.append(float(loss.detach()))
        return loss

    @property
    def loss(self) -> float:
        """Sum of the micro-batches' losses."""
        total = 0.0
        for loss in self.losses:
            total += loss
        return total

    def collected(self) -> list[tuple[TokenTrace, float]]:
        """Return trace and loss of every micro-batch seen, in order, on the CPU."""
        traces = [trace.cpu() for trace in self.traces]
        return list(zip(traces, self.losses, strict=True))

    def merge(self, entries: Sequence[tuple[TokenTrace, float]]) -> None:
        """Take these for what was seen: of all micro-batches, whichever ranks saw them."""
        self.traces = [trace for trace, _ in entries]
        self.losses = [loss for _, loss in entries]

    def report(
        self, *, scatter_size: int = 256, num_ages: int | None = None
    ) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Return scalars and arrays over all loss tokens of the step (`loss_report.report`)."""
        return report(
            self.traces,
            version_now=self.version_now,
            loss=self.loss,
            clip_bounds=self.policy_loss.objective.clip_bounds if self.first else None,
            scatter_size=scatter_size,
            num_ages=num_ages,
        )


def _truncated(verdict: Verdict, terms: Terms, all_N: torch.Tensor) -> torch.Tensor:
    causes = [*terms.truncated.values()]
    if verdict.truncated_T is not None:
        causes.append(verdict.truncated_T)
    return torch.stack(causes).any(0) if causes else torch.zeros_like(all_N)
