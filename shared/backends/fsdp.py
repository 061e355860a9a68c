"""Sharding a packed model over data-parallel ranks with torch's FSDP2 (`fully_shard`).

Every rank keeps its rows of every parameter, gathers a layer's before it runs and sums gradients
into its rows after. Sums, not means: the loss is already divided by the count of the whole step,
over all ranks. Where narrower models train, their parameters are kept in float32 (they are the
master weights), cast for each forward, and their gradients summed in float32.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from shared.backends.hf_files import HfFiles
from shared.backends.hf_names import owners, published_places, write
from shared.backends.packed_model import PackedModel


def master_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that sharded parameters are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def shard(packed: PackedModel, mesh: DeviceMesh, dtype: torch.dtype) -> None:
    """Shard layer by layer; what is in no layer belongs to the whole forward.

    Args:
        packed: its parameters are on `meta`, in `master_dtype(dtype)`; `dtype` if it only scores.
        mesh: one dimension, the data-parallel ranks.
        dtype: of the forward.

    Raises:
        ValueError: the model has no list of layers.
    """
    layers = getattr(packed.model.base_model, "layers", None)
    if layers is None:
        raise ValueError(f"{type(packed.model).__name__} has no list of layers to shard")
    narrow = dtype != master_dtype(dtype)
    policy = MixedPrecisionPolicy(
        param_dtype=dtype if narrow else None,
        reduce_dtype=master_dtype(dtype),
        cast_forward_inputs=False,
    )
    for module in (*layers, packed):
        fully_shard(module, mesh=mesh, mp_policy=policy)
        sharded = cast("FSDPModule", module)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)  # gloo knows sums only


def reshard(packed: PackedModel) -> None:
    """Give back what a forward gathered outside the layers; nothing on an unsharded model.

    A backward pass does it by itself, a forward without one leaves whole parameters in place of
    the sharded ones.
    """
    module: Any = packed
    if isinstance(module, FSDPModule):
        module.reshard()


def allocate(packed: PackedModel, device: torch.device) -> None:
    """Give the sharded parameters memory; buffers keep their values."""
    buffers = {name: buffer for name, buffer in packed.named_buffers() if not buffer.is_meta}
    packed.to_empty(device=device)
    for name, buffer in buffers.items():
        module, _, leaf = name.rpartition(".")
        setattr(packed.get_submodule(module), leaf, buffer.to(device))


def read_weights(model: Any, files: HfFiles, dtype: torch.dtype) -> None:
    """Read each published tensor once and keep this rank's rows of it.

    The values go through `dtype` (the published one), as on one device.
    """
    held = owners(model)
    with torch.no_grad():
        for name, place in published_places(model).items():
            write(held[place.owner], place, files.read(name).to(dtype))


def published_shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """Return the shape of every published tensor, whole."""
    held = owners(model)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, place in published_places(model).items():
        owner = held[place.owner]
        shape = tuple(owner.shape)
        if place.index is not None:
            shape = shape[1:]
        if place.rows is not None:
            shape = (place.rows[1] - place.rows[0], *shape[1:])
        shapes[name] = shape
    return shapes
