"""How large the routing of an answer can get, against what the bus takes in one message."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from services.rollout.config import RolloutConfig
from shared.runtime.context import Context
from shared.weights.qwen3_layout import Qwen3Shape


def routing_bytes(raw: Mapping[str, Any], num_tokens: int) -> int:
    """Return the bytes of all rows of so many tokens under one version.

    Args:
        raw: `config.json` of a model that an engine holds.
        num_tokens: of prefix and answer.
    """
    shape = Qwen3Shape.of(raw)
    if not shape.moe_layers:
        return 0
    width = 1 if shape.num_experts <= 256 else 2
    return num_tokens * len(shape.moe_layers) * int(raw["num_experts_per_tok"]) * width


def warn_of_refusals(context: Context, config: RolloutConfig) -> None:
    """Say at start what would else show as failed episodes, the longest of every run first.

    After each update an answer carries the routing of its whole prefix again.
    """
    if config.model.routing != "replay":
        return
    raw = json.loads((Path(config.model.source) / "config.json").read_text())
    needed = routing_bytes(raw, config.sampling.context_tokens)
    if needed > context.bus.max_payload:
        context.log.warning(
            "long_answers_will_be_refused",
            context_tokens=config.sampling.context_tokens,
            routing_bytes=needed,
            max_payload=context.bus.max_payload,
            todo="raise the bus's max_payload, or lower sampling.context_tokens",
        )
