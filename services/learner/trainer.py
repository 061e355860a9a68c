"""One optimisation round on a backend: minibatches, micro-batches, the numbers they leave.

Deterministic: the same weights, optimizer state, batch and seed give the same bytes (on CPU with
one thread), which is what lets a restored learner keep the version numbers it had committed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from services.learner.config import LearnerSection
from services.learner.items import BatchItems, Item, pack_items, shuffled_minibatches
from services.learner.schedule import learning_rate
from shared.algo.batching import PackedBatch, hollow, share
from shared.algo.loss_report import by_minibatch
from shared.algo.policy_loss import MinibatchLoss, PolicyLoss, count
from shared.algo.proximal import Proxy
from shared.algo.shadow import SCATTER_SIZE, SeenTokens, ShadowLosses, ShadowReport, ShadowStep
from shared.backends.base import Backend, ForwardOutput, LossFn
from shared.backends.rank_commands import Collects, noted


@dataclass(frozen=True)
class StepOutcome:
    """What a round did, detached."""

    scalars: dict[str, float]
    arrays: dict[str, npt.NDArray[np.floating]]
    optimizer_steps: int
    """Taken in this round, skipped ones included; 0 when no token carried loss."""
    grad_norms: tuple[float, ...] = ()
    """Of each of them, before clipping; one that is not finite was skipped."""
    shadows: Mapping[str, Mapping[str, float]] = field(
        default_factory=dict[str, Mapping[str, float]]
    )
    """By further route: what its own step would have reported."""
    shadow_failure: str = ""
    """Why the comparison with them was given up."""


class Trainer:
    """Runs the configured objective on a backend."""

    def __init__(
        self,
        backend: Backend,
        section: LearnerSection,
        *,
        temperature: float,
        num_ages: int,
        proxy: Proxy | None = None,
        shadows: ShadowLosses | None = None,
    ) -> None:
        """Train `backend`; ages at or above `num_ages` share the last bin of the per-age sums.

        With a `proxy` the loss computes old log-probs between the sampler's and the current ones.
        `shadows` look on; they change nothing.
        """
        self._backend = backend
        self._section = section
        self._temperature = temperature
        self._num_ages = num_ages
        self._shadows = shadows
        self._policy_loss = PolicyLoss(section.algo.settings(), proxy=proxy)

    def step(
        self, batch: BatchItems, *, version: int, seed: int, compare: bool = False
    ) -> StepOutcome:
        """Take the optimizer steps from `version` to `version + 1`; `compare`: with the shadows."""
        optimizer = self._section.optimizer
        lr = learning_rate(optimizer, version, self._section.versions)
        started = time.perf_counter()
        scalars = _admitted(batch)
        arrays: dict[str, npt.NDArray[np.floating]] = {}
        norms: list[float] = []
        watched: _Watched | None = None
        trainable = [item for item in batch.items if item.loss_mask.any()]
        for minibatch in shuffled_minibatches(trainable, optimizer.minibatches, seed):
            micros = self._micro_batches(minibatch)
            denominators = count(micros, self._section.algo.horizon)
            loss = self._policy_loss.minibatch(
                denominators,
                version_now=version,
                first=not norms,
                weight_mean=self._policy_loss.weight_mean(micros),
            )
            loss_fn: LossFn = loss
            if compare and self._shadows is not None and not norms:
                step = self._shadows.step(denominators, version_now=version)
                loss_fn = watched = _Watched(loss, step)
            self._backend.accumulate(
                micros,
                OrNotFinite(loss_fn),
                temperature=self._temperature,
                with_entropy=self._policy_loss.needs_entropy,
            )
            norms.append(self._backend.step(lr, max_grad_norm=optimizer.max_grad_norm))
            self._note(loss, scalars, arrays, first=len(norms) == 1)
        scalars |= {
            "lr": lr,
            "grad_norm": float(np.mean(norms)) if norms else 0.0,
            "skipped_steps": float(sum(not math.isfinite(norm) for norm in norms)),
            "compute_s": time.perf_counter() - started,
        }
        if watched is None:
            return StepOutcome(scalars, arrays, len(norms), tuple(norms))
        report = watched.report(self._num_ages)
        scalars |= report.scalars
        arrays |= report.arrays
        return StepOutcome(
            scalars, arrays, len(norms), tuple(norms), report.by_route, watched.failure
        )

    def _micro_batches(self, items: list[Item]) -> list[PackedBatch]:
        """Lay out the step: of n data-parallel shares, share r takes every n-th from the r-th."""
        lengths = [item.num_tokens for item in items]
        shares = share(
            lengths, self._section.optimizer.micro_batch_tokens, self._backend.data_ranks
        )
        packs = [pack for step in zip(*shares, strict=True) for pack in step]
        return [
            pack_items([items[index] for index in pack]) if pack else hollow(pack_items(items[:1]))
            for pack in packs
        ]

    def _note(
        self,
        loss: MinibatchLoss,
        scalars: dict[str, float],
        arrays: dict[str, npt.NDArray[np.floating]],
        *,
        first: bool,
    ) -> None:
        reported, sums = loss.report(scatter_size=SCATTER_SIZE, num_ages=self._num_ages)
        arrays |= by_minibatch(arrays, reported)
        if first:
            scalars |= reported
            arrays |= {
                "age_tokens": sums["age_count"],
                "age_k3_d": sums["age_k3_d_sum"],
                "age_k3_s": sums["age_k3_s_sum"],
                "age_s_abs_log_p99": sums["age_s_abs_log_p99"],
                "scatter": sums["scatter"],
            }
            return
        # Later minibatches see weights that have moved: their figures are kept apart.
        scalars |= {f"last_{name}": value for name, value in reported.items()}


@dataclass
class OrNotFinite:
    """Lets a loss that is not finite have such a gradient: over all ranks its step is skipped.

    `Collects` what the loss does; travels to other ranks with it.
    """

    loss_fn: LossFn

    def __call__(self, output: ForwardOutput, batch: PackedBatch) -> torch.Tensor:
        loss = self.loss_fn(output, batch)
        return loss if bool(torch.isfinite(loss.detach()).all()) else loss * math.nan

    def collected(self) -> list[Any]:
        """Return what the loss noted of every micro-batch."""
        return noted(self.loss_fn)

    def merge(self, entries: Sequence[Any]) -> None:
        """Hand the loss what was noted, whichever ranks saw it."""
        if isinstance(self.loss_fn, Collects):
            self.loss_fn.merge(entries)


@dataclass
class _Watched:
    """The loss, with shadows that look at the same forward; what they do wrong stays theirs."""

    loss: MinibatchLoss
    shadow: ShadowStep
    failure: str = ""

    def __call__(self, output: ForwardOutput, batch: PackedBatch) -> torch.Tensor:
        result = self.loss(output, batch)
        if not self.failure:
            try:
                self.shadow.observe(output, batch, self.loss.traces[-1])
            except Exception as error:  # noqa: BLE001 - whoever looks on must not stop the step
                self.failure = f"{type(error).__name__}: {error}"
        return result

    def collected(self) -> list[tuple[Any, dict[str, SeenTokens], str]]:
        """Return what the loss and its shadows noted of every micro-batch, and the failure."""
        noted = self.loss.collected()
        seen = [{name: s.cpu() for name, s in micro.items()} for micro in self.shadow.seen]
        seen += [{}] * (len(noted) - len(seen))
        return [(one, shadows, self.failure) for one, shadows in zip(noted, seen, strict=True)]

    def merge(self, entries: Sequence[tuple[Any, dict[str, SeenTokens], str]]) -> None:
        """Take these for what was seen, whichever ranks saw them; one failure is everybody's."""
        self.loss.merge([noted for noted, _, _ in entries])
        self.shadow.seen = [shadows for _, shadows, _ in entries]
        self.failure = next((failure for _, _, failure in entries if failure), self.failure)

    def report(self, num_ages: int) -> ShadowReport:
        """Return the comparison; an empty one after a failure."""
        try:
            if not self.failure:
                return self.shadow.report(num_ages=num_ages)
        except Exception as error:  # noqa: BLE001 - as above
            self.failure = f"{type(error).__name__}: {error}"
        return ShadowReport({}, {}, {})


def _admitted(batch: BatchItems) -> dict[str, float]:
    ages = batch.ages
    total = batch.should_train_tokens
    return {
        "loss_tokens": float(len(ages)),
        "exact_tokens": float(batch.exact_tokens),
        "should_train_tokens": float(total),
        "old_logits_exact_ratio": batch.exact_tokens / total if total else 1.0,
        "tokens_trained": float(batch.sampled_tokens),
        "staleness_mean": float(ages.mean()) if len(ages) else 0.0,
        "staleness_max": float(ages.max()) if len(ages) else 0.0,
    }
