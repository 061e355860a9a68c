"""Random weights for the benchmarks of `make bench-rollout`."""

from __future__ import annotations

from collections.abc import Mapping

import torch


def random_weights(
    shapes: Mapping[str, tuple[int, ...]], standard_deviation: float
) -> dict[str, torch.Tensor]:
    """Return float32 tensors, the same in every run: matrices normal, vectors (norms) of ones."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.ones(shape)
        if len(shape) == 1
        else torch.randn(shape, generator=generator) * standard_deviation
        for name, shape in shapes.items()
    }
