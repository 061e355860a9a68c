"""A mixture of experts in numpy float64, for the audit's own forward.

As Qwen3 does it: softmax over the router's logits, the K largest (or those recorded by the
sampler), renormalised where the config says so, SwiGLU experts (arXiv 2505.09388). Shares no code
with the services.

Shapes: N tokens, H hidden size, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt

F8 = npt.NDArray[np.float64]
I8 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class ExpertsConfig:
    """What of `config.json` the experts depend on."""

    num_experts: int
    per_token: int
    renormalised: bool
    layers: tuple[int, ...]
    """Those that have experts, ascending; the others are dense."""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> ExpertsConfig:
        """Read a Hugging Face config of `model_type` qwen3_moe.

        Raises:
            KeyError: a missing key.
        """
        key = "num_local_experts" if "num_local_experts" in config else "num_experts"
        dense = set(cast("list[int]", config.get("mlp_only_layers") or []))
        every = int(config.get("decoder_sparse_step", 1))
        return cls(
            num_experts=int(config[key]),
            per_token=int(config["num_experts_per_tok"]),
            renormalised=bool(config.get("norm_topk_prob", False)),
            layers=tuple(
                layer
                for layer in range(int(config["num_hidden_layers"]))
                if layer not in dense and (layer + 1) % every == 0
            ),
        )


def mix_experts(
    config: ExpertsConfig,
    x_NH: F8,
    router_EH: F8,
    expert: Callable[[int, F8], F8],
    recorded_NK: I8,
) -> F8:
    """Return the layer's output [N, H].

    Args:
        config: of the model.
        x_NH: normed hidden states.
        router_EH: the router's matrix.
        expert: the e-th expert's output for some of the rows.
        recorded_NK: experts to take; rows of -1 are left to the router.
    """
    logits_NE = x_NH @ router_EH.T
    shares_NE = np.exp(logits_NE - logits_NE.max(axis=-1, keepdims=True))
    shares_NE /= shares_NE.sum(axis=-1, keepdims=True)
    largest_NK = np.argsort(-shares_NE, axis=-1, kind="stable")[:, : config.per_token]
    chosen_NK = np.where(recorded_NK < 0, largest_NK, recorded_NK)
    shares_NK = np.take_along_axis(shares_NE, chosen_NK, axis=-1)
    if config.renormalised:
        shares_NK = shares_NK / shares_NK.sum(axis=-1, keepdims=True)
    mixed_NH = np.zeros_like(x_NH)
    for number in np.unique(chosen_NK):
        rows, choice = np.nonzero(chosen_NK == number)
        mixed_NH[rows] += expert(int(number), x_NH[rows]) * shares_NK[rows, choice][:, None]
    return mixed_NH
