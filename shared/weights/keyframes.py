"""Keyframes: a whole version as safetensors bytes."""

from __future__ import annotations

from collections.abc import Mapping

import safetensors.torch as st
import torch
from safetensors import SafetensorError

from shared.weights.errors import Corrupt

ENCODING = "safetensors"
"""Name of this encoding in `Artefact.encoding`."""


def encode(state: Mapping[str, torch.Tensor]) -> bytes:
    """Return the safetensors file of a state; tensors that share memory are written separately."""
    seen: set[int] = set()
    separate: dict[str, torch.Tensor] = {}
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        separate[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return st.save(separate)


def decode(data: bytes) -> dict[str, torch.Tensor]:
    """Return the tensors of a keyframe, in memory of their own.

    Raises:
        Corrupt: not a safetensors file.
    """
    try:
        return st.load(data)
    except (SafetensorError, KeyError, ValueError) as error:
        raise Corrupt("keyframe", "safetensors", str(error)) from error
