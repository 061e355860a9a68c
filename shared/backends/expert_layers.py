"""What routing rows a model can replay, and whether given ones are such. Pure.

Shapes: T tokens of a packed batch, L layers with experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch

from shared.algo.batching import PackedBatch
from shared.backends.routing import NOT_RECORDED, ROUTING
from shared.wire.trajectory import RoutingRecord


@dataclass(frozen=True)
class ExpertLayers:
    """The routers of a model: as many, as wide and as choosy."""

    layers: int
    """L: those that have experts, of the whole model whatever the layout."""
    per_token: int
    """K."""
    experts: int
    """Expert ids are below it."""


class HasExperts(Protocol):
    """A backend, as far as its routers go."""

    @property
    def expert_layers(self) -> ExpertLayers | None: ...


def check_routing(batch: PackedBatch, has: ExpertLayers | None) -> None:
    """Refuse rows that the model's routers cannot have chosen; nothing without rows.

    Args:
        batch: see `routing.ROUTING`.
        has: the model's; None where it has no experts, or nobody knows how to give them.

    Raises:
        ValueError: names what was given and what the model has, in one line.
    """
    rows_TLK = batch.per_token.get(ROUTING)
    if rows_TLK is None:
        return
    shape = tuple(rows_TLK.shape)
    if has is None:
        raise ValueError(
            f"routing {list(shape)} was recorded, but the model has no layers that take recorded "
            "experts: is it the model that was sampled?"
        )
    wanted = (batch.num_tokens, has.layers, has.per_token)
    if shape != wanted:
        raise ValueError(
            f"routing {list(shape)} is not [tokens, layers with experts, experts per token] of "
            f"this model and batch, {list(wanted)}"
        )
    if not rows_TLK.numel():
        return
    low, high = int(rows_TLK.min()), int(rows_TLK.max())
    if low < NOT_RECORDED or high >= has.experts:
        wrong = high if high >= has.experts else low
        raise ValueError(f"routing names expert {wrong}, but the model has {has.experts} a layer")
    ordered_TLK = rows_TLK.sort(dim=-1).values
    twice_TLK = (ordered_TLK[..., 1:] == ordered_TLK[..., :-1]) & (ordered_TLK[..., 1:] >= 0)
    if bool(twice_TLK.any()):
        token, layer, _ = twice_TLK.nonzero()[0].tolist()
        raise ValueError(
            f"routing of token {token} names an expert twice in layer {layer} of those with "
            f"experts, {rows_TLK[token, layer].tolist()}: a router chooses {has.per_token} "
            "different ones"
        )
    absent_TLK = rows_TLK == NOT_RECORDED
    partly_TL = absent_TLK.any(-1) & ~absent_TLK.all(-1)
    if bool(partly_TL.any()):
        token, layer = partly_TL.nonzero()[0].tolist()
        raise ValueError(
            f"routing of token {token} is recorded in part in layer {layer} of those with experts, "
            f"{rows_TLK[token, layer].tolist()}: all {has.per_token} experts or none"
        )


def check_records(records: Sequence[RoutingRecord], has: ExpertLayers | None) -> str:
    """Return why records cannot be of these routers, empty when nothing speaks against it."""
    for record in records:
        experts_TLK = record.experts.numpy()
        shape = experts_TLK.shape[1:]
        if has is None:
            return "routing was recorded, but experts are not replayed here"
        if shape != (has.layers, has.per_token):
            return (
                f"routing of {shape[0]} layers and {shape[1]} experts a token, the model has "
                f"{has.layers} and {has.per_token}"
            )
        if experts_TLK.max() >= has.experts:
            return f"routing names expert {experts_TLK.max()}, the model has {has.experts} a layer"
        if _repeated(experts_TLK):
            return "routing names an expert twice for a token"
    return ""


def _repeated(experts_TLK: npt.NDArray[np.unsignedinteger[Any]]) -> bool:
    """Whether a row names an expert twice: every two choices compared, a tenth of a sort's time."""
    choices = [np.ascontiguousarray(experts_TLK[..., k]) for k in range(experts_TLK.shape[-1])]
    return any(bool((one == other).any()) for one, other in combinations(choices, 2))


def replayed(backend: HasExperts, routing: Literal["recompute", "replay"]) -> ExpertLayers | None:
    """Return what is replayed under a policy (`model.routing`), None where nothing is.

    Raises:
        ValueError: replay, and the model has no experts, or its routers cannot be given any.
    """
    if routing == "recompute":
        return None
    has = backend.expert_layers
    if has is None:
        raise ValueError("model.routing replay: the model has no experts; set recompute")
    return has


def chosen(rows_TK: torch.Tensor, own_TK: torch.Tensor) -> torch.Tensor:
    """Return the experts to take, i64: the given ones, the router's own where none are."""
    given_TK = rows_TK.to(own_TK)
    return torch.where(given_TK == NOT_RECORDED, own_TK, given_TK)
