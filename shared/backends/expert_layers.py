"""What routing rows a model can replay, and whether given ones are such. Pure.

Shapes: T tokens of a packed batch, L layers with experts, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from shared.algo.batching import PackedBatch
from shared.backends.routing import NOT_RECORDED, ROUTING


@dataclass(frozen=True)
class ExpertLayers:
    """The routers of a model: as many, as wide and as choosy."""

    layers: int
    """L: those that have experts, of the whole model whatever the layout."""
    per_token: int
    """K."""
    experts: int
    """Expert ids are below it."""


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


def chosen(rows_TK: torch.Tensor, own_TK: torch.Tensor) -> torch.Tensor:
    """Return the experts to take, i64: the given ones, the router's own where none are."""
    given_TK = rows_TK.to(own_TK)
    return torch.where(given_TK == NOT_RECORDED, own_TK, given_TK)
