"""What may be done to each decoder layer: recompute its activations, compile it.

Both leave the layer before the head alone. Its activations are the first that the backward pass
needs, so recomputing them saves nothing; and its MLP runs on other rows in each call
(`last_mlp.py`), which a recomputation outside the call would not know.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class LayerOptions:
    """How decoder layers are run."""

    recompute: bool = False
    """Keep one activation per layer and compute the rest again in the backward pass: the same
    bits, a third more multiplications."""
    compile: bool = False
    """torch.compile: other bits than the plain layer, so learner and oracle must agree on it."""


def apply_options(model: Any, options: LayerOptions) -> None:
    """Wrap the forwards of `model.base_model.layers[:-1]`.

    Raises:
        ValueError: an option is on and the model has no such list.
    """
    if not (options.recompute or options.compile):
        return
    layers = getattr(model.base_model, "layers", None)
    if layers is None:
        raise ValueError(
            f"{type(model).__name__} has no list of layers: recompute and compile are unavailable"
        )
    for layer in layers[:-1]:
        if options.compile:
            layer.forward = torch.compile(layer.forward, dynamic=True)
        if options.recompute:
            layer.forward = partial(_recomputed, layer.forward)


def _recomputed(forward: Any, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    # no dropout anywhere: there is no generator state to restore
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
