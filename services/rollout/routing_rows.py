"""Which experts every token in the KV cache went to, so that a reused prefix brings its routing.

Shapes: S slots, C context, L layers with experts, K experts per token, N tokens of one forward.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from services.rollout.qwen3_config import Qwen3Config
from shared.wire.base import Array, DType
from shared.wire.trajectory import RoutingRecord


class RoutingRows:
    """[S, C, L, K], beside the keys and values: written and given up with them."""

    def __init__(self, config: Qwen3Config, slots: int, context: int) -> None:
        self._wire: DType = "u1" if config.num_experts <= 256 else "u2"
        shape = (slots, context, len(config.expert_layers), config.experts_per_token)
        self._rows_SCLK = np.zeros(shape, dtype=f"<{self._wire}")

    def write(
        self,
        layer: int,
        slots_N: npt.NDArray[np.int64],
        positions_N: npt.NDArray[np.int64],
        experts_NK: npt.NDArray[Any],
    ) -> None:
        """Record what a layer, the `layer`-th that has experts, chose in a forward."""
        self._rows_SCLK[slots_N, positions_N, layer] = experts_NK

    def record(self, slot: int, start: int, stop: int, version: int) -> RoutingRecord:
        """Return a copy of the rows of tokens [start, stop), at least one, in wire form."""
        rows = Array.of(self._rows_SCLK[slot, start:stop], self._wire)
        return RoutingRecord(version=version, start=start, stop=stop, experts=rows)
