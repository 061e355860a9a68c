"""Recorded experts in a megatron-core model: its routers take them in place of their own choice.

A stand-in for megatron-core's own `RouterReplay`, in the place where routers ask it. Theirs is one
list per process, whatever models live there, knows of no token that the router decides itself, and
hands rows to recomputed layers in an order that the caller must know. Here each layer's call
carries its rows, so that a layer recomputed in the backward pass finds those of its own
micro-batch. Weights of the chosen experts are the router's own, with gradient.

Shapes: T tokens of this rank, L layers with experts of the whole model, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from shared.backends.expert_layers import chosen

TopK = Callable[..., tuple[torch.Tensor, torch.Tensor]]


class GivenExperts:
    """What one router asks for its experts."""

    def __init__(self) -> None:
        self.rows_TK: torch.Tensor | None = None

    def get_replay_topk(
        self,
        scores_TE: torch.Tensor,
        topk: int,
        num_groups: int | None,
        group_topk: int | None,
        default_compute_topk: TopK,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scores and ids [T, K] of the experts to take."""
        scores_TK, own_TK = default_compute_topk(scores_TE, topk, num_groups, group_topk)
        if self.rows_TK is None:
            return scores_TK, own_TK
        ids_TK = chosen(self.rows_TK, own_TK)
        return scores_TE.gather(1, ids_TK), ids_TK


def replay_routing(model: Any) -> None:
    """Let the routers of this rank's layers take what `PackedSeqParams.routing` holds.

    Every layer of the model has experts (`layout.Shape`), and is numbered from 1 over all stages.
    """
    for layer in model.decoder.layers:
        router = layer.mlp.router
        router.router_replay = GivenExperts()
        take = partial(_take_rows, router.router_replay, layer.layer_number - 1)
        layer.register_forward_pre_hook(take, with_kwargs=True)


def _take_rows(
    given: GivenExperts, number: int, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    rows_TLK: torch.Tensor | None = kwargs["packed_seq_params"].routing
    given.rows_TK = None if rows_TLK is None else rows_TLK[:, number]
