"""Whether a published state is one of the model that an engine computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch


def check_state(
    state: Mapping[str, torch.Tensor], shapes: Mapping[str, Sequence[int]], dtype: torch.dtype
) -> None:
    """Compare names, shapes and kinds with the model's.

    Args:
        state: published tensors.
        shapes: the model's, by published name.
        dtype: in which the engine holds them.

    Raises:
        ValueError: names both sides of the first disagreement.
    """
    if odd := sorted(shapes.keys() ^ state.keys()):
        side = "the published state" if odd[0] in state else "the model"
        raise ValueError(f"tensor {odd[0]!r} is only in {side} ({len(odd)} such tensors)")
    for name, shape in shapes.items():
        tensor = state[name]
        if list(tensor.shape) != list(shape):
            raise ValueError(
                f"tensor {name!r}: published {list(tensor.shape)}, model {list(shape)}"
            )
        if not tensor.dtype.is_floating_point:
            raise ValueError(f"tensor {name!r}: published {tensor.dtype}, model {dtype}")
