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
from shared.algo.corrections import Layout, correct
from shared.algo.losses import Denominators, aggregate, clip_causes, decoupled_ppo
from shared.algo.objective import Objective
from shared.algo.proximal import Proxy, alpha_by_age, linear_proxy, loglinear_proxy
from shared.algo.ratios import split

PER_TOKEN = ("loss_mask", "old_logprobs", "sampler_logprobs", "advantages", "versions")
"""Required in `PackedBatch.per_token`, each [T]: m (bool or 0/1), ℓ^old, ℓ^inf, A, and the i64
stamp v. All but the mask are read only where it is 1. Optional `trajectory` i64: tokens of one
trajectory share a number inside the micro-batch; absent, each sequence is one."""


PROXIES = {"loglinear": loglinear_proxy, "linear": linear_proxy}


class Output(Protocol):
    """What the loss needs of a forward (`shared.backends.base.ForwardOutput`)."""

    @property
    def logprobs_T(self) -> torch.Tensor: ...
    @property
    def entropy_T(self) -> torch.Tensor | None: ...


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
    num_segments: int


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

    @property
    def needs_entropy(self) -> bool:
        """Whether the forward must return entropies."""
        return self.objective.entropy_bonus > 0

    def minibatch(
        self, denominators: Denominators, *, version_now: int, first: bool = True
    ) -> MinibatchLoss:
        """Return the loss function of one optimizer step.

        Args:
            denominators: of the whole optimizer step (`count`).
            version_now: the version the batch is trained from.
            first: whether nothing was stepped since `version_now` was published; the share of
                tokens outside the clip is then `clipped_on_arrival`.
        """
        return MinibatchLoss(self, denominators, version_now=version_now, first=first)

    def compute(
        self,
        output: Output,
        batch: PackedBatch,
        denominators: Denominators,
        *,
        version_now: int = 0,
    ) -> tuple[torch.Tensor, TokenTrace]:
        """Return the scalar loss of a micro-batch and what it did to each loss token.

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
        layout = Layout(all_N, *_renumber(trajectory_of(batch)[rows_N]))
        adv_N = adv_N.to(ratios.log_s_T.dtype)

        verdict = correct(
            ratios.log_d_T,
            layout,
            kind=want.discrepancy,
            low=want.discrepancy_low,
            high=want.discrepancy_high,
            veto_below=want.veto,
        )
        rejected = {**verdict.rejected, "nonfinite": ~ratios.finite_T}
        keep_N = ~torch.stack(list(rejected.values())).any(0)
        low, high, dual = want.clip_low, want.clip_high, want.dual
        loss_N = decoupled_ppo(
            ratios.log_s_T, verdict.weight_T, adv_N, clip_low=low, clip_high=high, dual=dual
        )
        loss = aggregate(loss_N, keep_N, layout, denominators, mode=want.aggregation)
        entropy_N = None if output.entropy_T is None else output.entropy_T[rows_N]
        if self.needs_entropy:
            if entropy_N is None:
                raise ValueError("entropy_bonus is set: run the forward with_entropy=True")
            bonus = aggregate(entropy_N, all_N, layout, denominators, mode=want.aggregation)
            loss = loss - want.entropy_bonus * bonus
        trace = TokenTrace(
            log_d_N=ratios.log_d_T,
            log_s_N=ratios.log_s_T.detach(),
            weight_N=verdict.weight_T,
            adv_N=adv_N,
            versions_N=versions_N,
            seq_N=layout.seq_T,
            entropy_N=None if entropy_N is None else entropy_N.detach(),
            rejected=rejected,
            cut=clip_causes(ratios.log_s_T, adv_N, clip_low=low, clip_high=high, dual=dual),
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
    traces: list[TokenTrace] = field(default_factory=list[TokenTrace], init=False)
    loss: float = field(default=0.0, init=False)
    """Sum of the micro-batches' losses."""

    def __call__(self, output: Output, batch: PackedBatch) -> torch.Tensor:
        """Return the scalar to differentiate."""
        loss, trace = self.policy_loss.compute(
            output, batch, self.denominators, version_now=self.version_now
        )
        self.traces.append(trace)
        self.loss += float(loss.detach())
        return loss

    def report(
        self, *, scatter_size: int = 256, num_ages: int | None = None
    ) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Return scalars and arrays over all loss tokens of the step, before rejection.

        Scalars: `loss`, `num_loss_tokens`, `d_*`, `s_*`, `rho_*` (see
        `diagnostics.pair_summary`), `rej_*` and clip fractions, staleness, `entropy_mean`,
        `weight_mean`, and on the first minibatch `clipped_on_arrival`. Arrays: `age_count`,
        `age_k3_d_sum`, `age_k3_s_sum`, `age_k3_rho_sum` (in the first minibatch the last is
        what k3(D) would be under `current_recompute`), `scatter` f32[M, 3].
        """
        if not self.traces:
            raise ValueError("report: no micro-batch was trained")
        log_d_N = torch.cat([t.log_d_N for t in self.traces]).double()
        log_s_N = torch.cat([t.log_s_N for t in self.traces]).double()
        versions_N = torch.cat([t.versions_N for t in self.traces])
        adv_N = torch.cat([t.adv_N for t in self.traces])
        seq_N = torch.cat([t.seq_N + (i << 32) for i, t in enumerate(self.traces)])
        ages_N = (self.version_now - versions_N).long()
        log_rho_N = log_d_N + log_s_N
        scalars: dict[str, float] = {
            "loss": self.loss,
            "num_loss_tokens": float(log_d_N.numel()),
            "num_segments": float(sum(t.num_segments for t in self.traces)),
        }
        for name, log_N in (("d", log_d_N), ("s", log_s_N), ("rho", log_rho_N)):
            summary = diagnostics.pair_summary(log_N) | diagnostics.sequence_summary(log_N, seq_N)
            scalars |= {f"{name}_{key}": value for key, value in summary.items()}
        rejected = _joined([t.rejected for t in self.traces])
        scalars |= diagnostics.fractions_by_cause(
            rejected, _joined([t.cut for t in self.traces]), adv_N
        )
        scalars |= diagnostics.staleness(versions_N, seq_N, version_now=self.version_now)
        if log_d_N.numel():
            scalars["weight_mean"] = float(torch.cat([t.weight_N for t in self.traces]).mean())
            entropies = [t.entropy_N for t in self.traces if t.entropy_N is not None]
            if entropies:
                scalars["entropy_mean"] = float(torch.cat(entropies).mean())
            if self.first:
                scalars["clipped_on_arrival"] = self._outside_clip(log_s_N)
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

    def _outside_clip(self, log_s_N: torch.Tensor) -> float:
        want, s_N = self.policy_loss.objective, torch.exp(log_s_N)
        outside_N = (s_N < 1.0 - want.clip_low) | (s_N > 1.0 + want.clip_high)
        return float(outside_N.double().mean())


def _joined(by_cause: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {cause: torch.cat([part[cause] for part in by_cause]) for cause in by_cause[0]}
