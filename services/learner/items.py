"""From a journalled batch and its trajectories to arrays per sequence. Pure.

T is the number of tokens of one sequence.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from services.learner.routes.forwards import Logprobs
from services.learner.staging import Scored
from shared.algo.batching import PackedBatch, pack
from shared.algo.policy_loss import PROX
from shared.algo.shadow import COMPARED, given_key
from shared.backends.routing import ROUTING, Rows, not_recorded, routing_rows
from shared.wire.journal import Batch, Member, TrainedGroup
from shared.wire.messages import SequenceScore
from shared.wire.trajectory import Sequence as TokenSequence


@dataclass(frozen=True)
class Item:
    """One sequence as the loss sees it."""

    token_ids: npt.NDArray[np.int32]
    loss_mask: npt.NDArray[np.bool_]
    """True where the token is in the loss."""
    sampled_mask: npt.NDArray[np.bool_]
    """True where the policy sampled the token, masked or not."""
    versions: npt.NDArray[np.int64]
    """Stamp, -1 where nothing was sampled."""
    old_logprobs: npt.NDArray[np.floating]
    sampler_logprobs: npt.NDArray[np.floating]
    advantages: npt.NDArray[np.floating]
    """[T], of the trajectory or of each turn; NaN, and no loss, in turns without any."""
    reward: float
    """Raw, of its trajectory."""
    trajectory: int
    """Index of its trajectory in the batch: sequences of one trajectory share it."""

    reference_logprobs: npt.NDArray[np.floating] | None = None
    """Of the reference model, where `algo.kl` is on."""
    prox_logprobs: npt.NDArray[np.floating] | None = None
    """Of the trust-region anchor, under objective four_policy."""
    shadows: Mapping[str, npt.NDArray[np.floating]] = field(
        default_factory=dict[str, npt.NDArray[np.floating]]
    )
    """What further routes say of it; NaN where they say nothing."""
    compared: bool = True
    """Whether its trajectory is in the sample that shadows look at."""
    routing: Rows | None = None
    """[T, L, K]: experts to take; None leaves them to the router."""

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True)
class ShadowInputs:
    """What further routes computed for a step."""

    compared: Collection[str]
    """Tickets of the sampled trajectories."""
    by_route: Mapping[str, Mapping[str, Logprobs]] = field(
        default_factory=dict[str, Mapping[str, Logprobs]]
    )
    """Of routes with numbers of their own: one array [T] per sequence, by ticket, of the sampled
    ones that it has an answer for. NaN where it has none for a token."""


@dataclass(frozen=True)
class BatchItems:
    """The loss's sequences, and what was admitted in all."""

    items: tuple[Item, ...]
    """Sequences of groups that carry loss."""
    sampled_tokens: int
    """Sampled tokens of every admitted trajectory, groups without loss included."""
    should_train_tokens: int
    """Sampled tokens of groups that carry loss: the denominator of the exactness ratio."""
    exact_tokens: int
    """Those among them whose old log-prob is exact and in the loss."""
    ages: npt.NDArray[np.int64]
    """Age in versions of every sampled token that is in the loss."""


def build_items(
    batch: Batch,
    members: Mapping[str, Scored],
    old: Mapping[str, tuple[SequenceScore, ...]],
    reference: Mapping[str, Sequence[npt.NDArray[np.floating]]] | None = None,
    shadows: ShadowInputs | None = None,
    prox: Mapping[str, tuple[SequenceScore, ...]] | None = None,
) -> BatchItems:
    """Arrange a batch in journal order; the same entry gives the same arrays on replay.

    Args:
        batch: what was decided.
        members: its trajectories, by ticket id.
        old: their old log-probs.
        reference: log-probs of the reference model per sequence, where `algo.kl` is on.
        shadows: of further routes, where they are compared at this step.
        prox: log-probs of the trust-region anchor, under objective four_policy.
    """
    items: list[Item] = []
    sampled = should_train = exact = num_trajectories = 0
    ages: list[npt.NDArray[np.int64]] = []
    for group in batch.groups:
        for member in group.members:
            scored = members[member.ticket_id]
            sequences = scored.trajectory.sequences
            num_sampled = sum(int(s.loss_mask.numpy().sum()) for s in sequences)
            sampled += num_sampled
            if group.no_loss:
                continue
            num_trajectories += 1
            of_reference = reference[member.ticket_id] if reference else [None] * len(sequences)
            of_turns = iter(member.turn_advantages)
            for index, (sequence, score, logprobs) in enumerate(
                zip(sequences, old[member.ticket_id], of_reference, strict=True)
            ):
                item = _item(sequence, score, group, member, num_trajectories, logprobs)
                if member.turn_advantages:
                    item = _by_turn(item, sequence, list(islice(of_turns, len(sequence.turns))))
                should_train += int((item.sampled_mask & ~np.isnan(item.advantages)).sum())
                if prox is not None:
                    item = replace(
                        item, prox_logprobs=prox[member.ticket_id][index].old_logprobs.numpy()
                    )
                if shadows is not None:
                    item = _shadowed(item, shadows, member.ticket_id, index)
                own = [entry.version for entry in score.versions if entry.status == "exact"]
                exact += int((item.loss_mask & np.isin(item.versions, own)).sum())
                ages.append(batch.version - item.versions[item.loss_mask])
                items.append(item)
    return BatchItems(
        items=tuple(items),
        sampled_tokens=sampled,
        should_train_tokens=should_train,
        exact_tokens=exact,
        ages=np.concatenate(ages) if ages else np.zeros(0, dtype=np.int64),
    )


def shuffled_minibatches(items: Sequence[Item], count: int, seed: int) -> list[list[Item]]:
    """Split into `count` parts of nearly equal size after a permutation fixed by `seed`."""
    order = np.random.default_rng(seed).permutation(len(items))
    parts = np.array_split(order, min(count, len(items)) or 1)
    return [[items[i] for i in part] for part in parts if len(part)]


def pack_items(items: Sequence[Item]) -> PackedBatch:
    """Lay items end to end with the per-token tensors that the loss reads."""
    per_token: dict[str, list[npt.NDArray[Any]]] = {
        "loss_mask": [item.loss_mask for item in items],
        "old_logprobs": [item.old_logprobs for item in items],
        "sampler_logprobs": [item.sampler_logprobs for item in items],
        "advantages": [item.advantages for item in items],
        "scores": [_constant(item, item.reward) for item in items],
        "versions": [item.versions for item in items],
        "trajectory": [np.full(item.num_tokens, item.trajectory, dtype=np.int64) for item in items],
    }
    references = [i.reference_logprobs for i in items if i.reference_logprobs is not None]
    if references:
        per_token["reference_logprobs"] = references
    anchors = [i.prox_logprobs for i in items if i.prox_logprobs is not None]
    if anchors:
        per_token[PROX] = anchors
    for route in items[0].shadows:
        per_token[given_key(route)] = [item.shadows[route] for item in items]
    like = next((item.routing for item in items if item.routing is not None), None)
    if like is not None:
        per_token[ROUTING] = [
            not_recorded(item.num_tokens, like) if item.routing is None else item.routing
            for item in items
        ]
    if not all(item.compared for item in items):
        per_token[COMPARED] = [np.full(i.num_tokens, i.compared, dtype=np.bool_) for i in items]
    batch = pack([item.token_ids for item in items], per_token)
    batch.per_token["advantages"].nan_to_num_()
    return batch


def _constant(item: Item, value: float) -> npt.NDArray[np.floating]:
    return np.full(item.num_tokens, value, dtype=item.old_logprobs.dtype)


def _item(
    sequence: TokenSequence,
    score: SequenceScore,
    group: TrainedGroup,
    member: Member,
    trajectory: int,
    reference_logprobs: npt.NDArray[np.floating] | None,
) -> Item:
    versions = np.full(sequence.token_ids.shape[0], -1, dtype=np.int64)
    for span in sequence.spans:
        versions[span.start : span.stop] = span.version
    sampled = sequence.loss_mask.numpy().astype(bool)
    old_logprobs = score.old_logprobs.numpy()
    return Item(
        token_ids=sequence.token_ids.numpy(),
        loss_mask=sampled & ~np.isin(versions, group.masked_versions),
        sampled_mask=sampled,
        versions=versions,
        old_logprobs=old_logprobs,
        sampler_logprobs=sequence.arrays["sampler_logprobs"].numpy(),
        advantages=np.full(len(versions), member.advantage, dtype=old_logprobs.dtype),
        reward=member.reward,
        trajectory=trajectory,
        reference_logprobs=reference_logprobs,
        routing=routing_rows(sequence.routing, len(versions)),
    )


def _by_turn(item: Item, sequence: TokenSequence, values: list[float | None]) -> Item:
    advantages = item.advantages.copy()
    for turn, value in zip(sequence.turns, values, strict=True):
        advantages[turn.start : turn.stop] = np.nan if value is None else value
    return replace(item, advantages=advantages, loss_mask=item.loss_mask & ~np.isnan(advantages))


def _shadowed(item: Item, shadows: ShadowInputs, ticket_id: str, sequence: int) -> Item:
    nothing = np.full_like(item.old_logprobs, np.nan)
    return replace(
        item,
        compared=ticket_id in shadows.compared,
        shadows={
            route: by_ticket[ticket_id][sequence].astype(nothing.dtype, copy=False)
            if ticket_id in by_ticket
            else nothing
            for route, by_ticket in shadows.by_route.items()
        },
    )
