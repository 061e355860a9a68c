"""Recorded experts in a transformers model: its routers take them in place of their own choice.

The rows travel as an argument of every decoder layer, so that a layer whose activations are
recomputed in the backward pass finds those of its own forward. Only the choice is given: weights
of the chosen experts are the router's own probabilities, with gradient (arXiv 2510.11370).

Shapes: T tokens of a packed batch, L layers with experts, K experts per token, E experts of a
layer, D hidden size.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.func import functional_call

from shared.backends.expert_layers import ExpertLayers, chosen

ROWS = "routing_rows_TLK"
"""Keyword of a decoder layer's forward."""

Routed = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""What a router returns: logits_TE, the weights of the chosen experts [T, K], their ids [T, K]."""


class RoutingReplay:
    """Wraps the routers of a decoder; a model without experts is left alone.

    Known are routers whose weights are probabilities of a float32 softmax over all experts,
    renormalised over the chosen ones or not: Qwen2, Qwen3 and Mixtral mixtures and their like.
    """

    def __init__(self, model: Any) -> None:
        """Wrap before anything else wraps the layers.

        Args:
            model: its parameters may be on `meta`.
        """
        layers: list[Any] = list(getattr(model.base_model, "layers", None) or ())
        found = [_router_of(layer) for layer in layers]
        self._routers = [_GivenExperts(router) for router in found if router is not None]
        self._model = type(model).__name__
        self._known = all(_agrees(router) for router in self._routers[:1])
        if not (self._routers and self._known):
            return
        for router in self._routers:
            router.install()
        remaining = iter(enumerate(self._routers))
        for layer, has in zip(layers, found, strict=True):
            number, router = next(remaining) if has is not None else (0, None)
            layer.forward = partial(_with_rows, layer.forward, number, router)

    @property
    def has(self) -> ExpertLayers | None:
        """What rows the model takes, None where it has no experts.

        Raises:
            ValueError: it has experts, and routers of another formula.
        """
        if not self._routers:
            return None
        if not self._known:
            raise ValueError(
                f"{self._model}: its {self._routers[0].kind} cannot replay recorded experts; set "
                "model.routing recompute"
            )
        first = self._routers[0]
        return ExpertLayers(len(self._routers), first.top_k, first.num_experts)


class _GivenExperts:
    """A router that takes the experts it is given."""

    def __init__(self, router: Any) -> None:
        self._router = router
        self._inner = router.forward
        self.kind = type(router).__name__
        self.top_k = int(router.top_k)
        self.num_experts = int(router.num_experts)
        self.renormalises = bool(getattr(router, "norm_topk_prob", True))
        self.rows_TK: torch.Tensor | None = None

    def install(self) -> None:
        self._router.forward = self._forward

    def _forward(self, hidden: torch.Tensor) -> Routed:
        routed: Routed = self._inner(hidden)
        return routed if self.rows_TK is None else self.with_experts(routed, self.rows_TK)

    def with_experts(self, routed: Routed, rows_TK: torch.Tensor) -> Routed:
        """Return what the router would have, had it chosen these."""
        logits_TE, own_weights_TK, own_TK = routed
        ids_TK = chosen(rows_TK, own_TK)
        probs_TE = torch.softmax(logits_TE, dim=-1, dtype=torch.float32)
        weights_TK = probs_TE.gather(-1, ids_TK)
        if self.renormalises:
            weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
        return logits_TE, weights_TK.to(own_weights_TK.dtype), ids_TK

    def probe(self) -> tuple[Routed, Routed]:
        """Return what router and stand-in make of its own choice, on weights made up for it."""
        generator = torch.Generator().manual_seed(0)
        size = tuple(self._router.weight.shape)
        made_up = {
            name: torch.randn(tuple(tensor.shape), generator=generator)
            for name, tensor in self._router.state_dict().items()
        }
        hidden = torch.randn(3, size[-1], generator=generator)
        with torch.no_grad():
            routed: Routed = functional_call(self._router, made_up, (hidden,))
            return routed, self.with_experts(routed, routed[2])


def _router_of(layer: Any) -> Any:
    """Return the module of a decoder layer that chooses experts, None in a dense one."""
    for module in layer.modules():
        weight = getattr(module, "weight", None)
        if hasattr(module, "top_k") and hasattr(module, "num_experts") and weight is not None:
            return module
    return None


def _agrees(router: _GivenExperts) -> bool:
    """Whether the stand-in makes the same weights of the router's own choice."""
    try:
        theirs, ours = router.probe()
        return torch.equal(theirs[1], ours[1]) and theirs[2].shape[-1] == router.top_k
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
        return False


def _with_rows(
    inner: Any, number: int, router: _GivenExperts | None, *args: Any, **kwargs: Any
) -> Any:
    rows_TLK: torch.Tensor | None = kwargs.pop(ROWS, None)
    if router is None or rows_TLK is None:
        return inner(*args, **kwargs)
    router.rows_TK = rows_TLK[:, number]
    try:
        return inner(*args, **kwargs)
    finally:
        router.rows_TK = None
