"""What one step did to one trajectory's tokens, by the learner's own functions. Pure.

The step is laid out again as `services/learner/trainer.py` does it: the journalled batch to items,
the same permutation to minibatches, the same packs to micro-batches. The objective runs on ℓ as a
leaf, so that autograd gives dL/dℓ of every token. The entropy bonus is left out: it does not act
through ℓ of the sampled token.

Shapes: T tokens of one sequence, N loss tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from services.learner.config import LearnerConfig
from services.learner.items import Item, build_items, pack_items, shuffled_minibatches
from services.learner.staging import Scored
from shared.algo.batching import PackedBatch, balance
from shared.algo.loss_report import TokenTrace
from shared.algo.losses import Denominators
from shared.algo.objective_specs import M2po
from shared.algo.policy_loss import PolicyLoss, count
from shared.algo.proximal import Proxy
from shared.cli.explained import Place
from shared.wire.journal import Batch
from shared.wire.messages import SequenceScore

F8 = npt.NDArray[np.float64]
B1 = npt.NDArray[np.bool_]
Current = Callable[[str], Sequence[npt.NDArray[np.floating[Any]]]]
"""Ticket id -> ℓ per sequence under the version stepped from; NaN where nothing was sampled."""


@dataclass
class SequenceTrace:
    """What the step did to one sequence; arrays are [T], NaN or False outside the loss mask."""

    loss_mask: B1
    place: Place | None = None
    log_d: F8 = field(init=False)
    log_s: F8 = field(init=False)
    weight: F8 = field(init=False)
    gradient: F8 = field(init=False)
    gradient_step: F8 = field(init=False)
    truncated: B1 = field(init=False)
    rejected: dict[str, B1] = field(default_factory=dict[str, B1])
    cut: dict[str, B1] = field(default_factory=dict[str, B1])

    def __post_init__(self) -> None:
        length = len(self.loss_mask)
        self.log_d, self.log_s, self.weight = (np.full(length, np.nan) for _ in range(3))
        self.gradient, self.gradient_step = (np.full(length, np.nan) for _ in range(2))
        self.truncated = np.zeros(length, dtype=bool)


@dataclass(frozen=True)
class _Forward:
    """What the loss reads of a forward."""

    logprobs_T: torch.Tensor
    entropy_T: torch.Tensor | None = None


@dataclass(frozen=True)
class StepRebuilt:
    """The objective of a run, ready to be asked about one trajectory of one batch."""

    config: LearnerConfig
    proxy: Proxy | None = None

    @property
    def policy_loss(self) -> PolicyLoss:
        settings = replace(self.config.learner.algo.settings(), entropy_bonus=0.0)
        return PolicyLoss(settings, proxy=self.proxy)

    @property
    def needs_every_old(self) -> bool:
        """Whether old log-probs of the whole batch matter: weights are normalised, or more."""
        kinds = {spec.kind for spec in self.config.learner.algo.corrections}
        return "self_normalise" in kinds or self.needs_every_current

    @property
    def needs_every_current(self) -> bool:
        """Whether what a token gets depends on ℓ of other trajectories in its micro-batch."""
        algo = self.config.learner.algo
        normalised = any(spec.kind == "self_normalise" for spec in algo.corrections)
        return isinstance(algo.objective, M2po) or (normalised and self.proxy is not None)

    def trace(
        self,
        batch: Batch,
        ticket_id: str,
        members: Mapping[str, Scored],
        old: Mapping[str, tuple[SequenceScore, ...]],
        current: Current,
        reference: Mapping[str, Sequence[npt.NDArray[np.floating]]] | None = None,
    ) -> list[SequenceTrace]:
        """Return what the step did to each sequence of one member of a group with loss.

        Args:
            batch: as journalled.
            ticket_id: of the member.
            members: of the whole batch.
            old: likewise, as the learner's route gave them.
            current: ℓ; asked for others only where they matter.
            reference: of the KL term.
        """
        optimizer = self.config.learner.optimizer
        built = build_items(batch, members, old, reference).items
        keys = [
            (member.ticket_id, number)
            for group in batch.groups
            if not group.no_loss
            for member in group.members
            for number in range(len(members[member.ticket_id].trajectory.sequences))
        ]
        key_of = {id(item): key for item, key in zip(built, keys, strict=True)}
        traces = [SequenceTrace(i.loss_mask) for i in built if key_of[id(i)][0] == ticket_id]
        trainable = [item for item in built if item.loss_mask.any()]
        minibatches = shuffled_minibatches(trainable, optimizer.minibatches, batch.seed)
        for order, minibatch in enumerate(minibatches):
            if not any(key_of[id(item)][0] == ticket_id for item in minibatch):
                continue
            packs = balance([i.num_tokens for i in minibatch], optimizer.micro_batch_tokens)
            micros = [pack_items([minibatch[index] for index in pack]) for pack in packs]
            by = count(micros, self.config.learner.algo.horizon)
            weight_mean = self.policy_loss.weight_mean(micros) if self.needs_every_old else None
            place = Place(order, len(minibatches), by.num_tokens, by.num_sequences, by.horizon)
            for pack in packs:
                chosen = [minibatch[index] for index in pack]
                own = [item for item in chosen if key_of[id(item)][0] == ticket_id]
                if not own:
                    continue
                items = chosen if self.needs_every_current else own
                facts = self._run(
                    items, [key_of[id(i)] for i in items], current, batch.version, by, weight_mean
                )
                for item, parts in zip(items, facts, strict=True):
                    ticket, number = key_of[id(item)]
                    if ticket == ticket_id:
                        traces[number] = parts
                        parts.place = place
        return traces

    def _run(
        self,
        items: Sequence[Item],
        keys: Sequence[tuple[str, int]],
        current: Current,
        version: int,
        by: Denominators,
        weight_mean: float | None,
    ) -> list[SequenceTrace]:
        micro = pack_items(items)
        now_T = np.concatenate(
            [current(ticket)[number] for ticket, number in keys], dtype=np.float64
        )
        loss = self.policy_loss
        summed = PolicyLoss(
            replace(loss.objective, aggregation="token_mean", horizon=None), proxy=self.proxy
        )
        trace, step_T = _differentiated(loss, micro, now_T, by, version, weight_mean)
        _, sum_T = _differentiated(summed, micro, now_T, Denominators(1, 1), version, weight_mean)
        return _split(items, micro, trace, sum_T, step_T)


def _differentiated(
    loss: PolicyLoss,
    micro: PackedBatch,
    now_T: F8,
    by: Denominators,
    version: int,
    weight_mean: float | None,
) -> tuple[TokenTrace, F8]:
    leaf_T = torch.from_numpy(np.nan_to_num(now_T)).requires_grad_()  # pyright: ignore[reportUnknownMemberType]
    value, trace = loss.compute(
        _Forward(leaf_T), micro, by, version_now=version, weight_mean=weight_mean
    )
    (gradient_T,) = torch.autograd.grad(value, [leaf_T])
    return trace, gradient_T.numpy().astype(np.float64)


def _split(
    items: Sequence[Item], micro: PackedBatch, trace: TokenTrace, sum_T: F8, step_T: F8
) -> list[SequenceTrace]:
    """Cut a packed trace back into sequences."""
    mask_T = micro.per_token["loss_mask"].bool().numpy()
    values = {
        "log_d": trace.log_d_N, "log_s": trace.log_s_N, "weight": trace.weight_N,
    }  # fmt: skip
    flags = {("rejected", cause): where_N for cause, where_N in trace.rejected.items()}
    flags |= {("cut", cause): where_N for cause, where_N in trace.cut.items()}
    flags[("truncated", "")] = trace.truncated
    found: list[SequenceTrace] = []
    start = 0
    for item in items:
        own = SequenceTrace(item.loss_mask)
        rows = slice(start, start + item.num_tokens)
        before = int(mask_T[:start].sum())
        within = slice(before, before + int(item.loss_mask.sum()))
        for name, values_N in values.items():
            getattr(own, name)[item.loss_mask] = values_N[within].double().numpy()
        own.gradient[item.loss_mask] = sum_T[rows][item.loss_mask]
        own.gradient_step[item.loss_mask] = step_T[rows][item.loss_mask]
        for (kind, cause), where_N in flags.items():
            where = np.zeros(item.num_tokens, dtype=bool)
            where[item.loss_mask] = where_N[within].numpy()
            if kind == "truncated":
                own.truncated = where
            else:
                getattr(own, kind)[cause] = where
        found.append(own)
        start += item.num_tokens
    return found
