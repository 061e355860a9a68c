"""Whether the model of a values file can be run as its configuration says, before anything starts.

Only what `config.json` tells: the services ask the model itself, and have the last word.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from shared.runtime.sections import ModelSection

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""Keys under which mixtures of experts say how many they have."""


def check_model(model: ModelSection, ranks: Mapping[str, int], *, engine_ranks: int = 1) -> None:
    """Refuse a policy or a layout that the model cannot have; nothing where no model lies here.

    Args:
        model: its section.
        ranks: processes of each role that holds the model over its layout.
        engine_ranks: tensor-parallel ranks of a rollout's engine.

    Raises:
        ValueError: one line that names the model and the key.
    """
    path = Path(model.source) / "config.json"
    if "://" in model.source or not path.is_file():
        return
    try:
        raw = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"`model.source`: {path}: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"`model.source`: {path} holds no JSON object")
    config = cast("dict[str, Any]", raw)
    if model.routing == "replay" and not any(config.get(key) for key in _EXPERTS):
        raise ValueError(
            f"`model.routing`: replay, but {model.source} has no experts (model_type "
            f"{config.get('model_type')!r}): set recompute"
        )
    heads = config.get("num_attention_heads")
    if isinstance(heads, int) and heads % engine_ranks:
        raise ValueError(
            f"`rollout.vllm.tensor_parallel_size`: {engine_ranks} does not divide "
            f"num_attention_heads {heads} of {model.source}"
        )
    if model.backend == "megatron":
        _check_layout(model, config, ranks)


def _check_layout(model: ModelSection, config: Mapping[str, Any], ranks: Mapping[str, int]) -> None:
    from shared.backends.megatron.layout import Layout, Shape  # torch: only when it is needed

    given = model.layout
    layout = Layout(given.tp, given.pp, given.ep, given.sp)
    try:
        Shape.of(config).check(layout)
        for count in ranks.values():
            layout.data_ranks(count)
    except ValueError as error:
        raise ValueError(f"`model`: {model.source}: {error}") from error
