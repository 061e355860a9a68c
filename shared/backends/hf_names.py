"""Where each published tensor lies in a transformers model in memory.

transformers stacks the experts of a layer into one parameter; files, engines and deltas know one
matrix per expert. A `Place` says which part of which parameter a published name is: a view, so
that nothing is copied to publish or to load. Sharded parameters (DTensor, first dimension) are
written part by part, each rank its own rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor


@dataclass(frozen=True, slots=True)
class Place:
    """A part of the tensor `owner` in the model's memory."""

    owner: str
    index: int | None = None
    """Along the first dimension (an expert); None: all of it."""
    rows: tuple[int, int] | None = None
    """Of the second dimension, half-open; None: all of them."""

    def of(self, owner: torch.Tensor) -> torch.Tensor:
        """Return the view of a whole, unsharded owner."""
        part = owner if self.index is None else owner[self.index]
        return part if self.rows is None else part[self.rows[0] : self.rows[1]]


def published_places(model: Any) -> dict[str, Place]:
    """Return where each published name lies: parameters, then persistent buffers; tied ones once.

    Of tied parameters the first name in the model's order stays. Buffers that are not
    persistent (rotary frequencies) are functions of the config and not published.
    """
    places: dict[str, Place] = {}
    for name, parameter in model.named_parameters(remove_duplicate=True):
        places.update(_expert_places(name, parameter) or {name: Place(name)})
    every = dict(model.named_parameters(remove_duplicate=False))
    places.update({name: Place(name) for name in model.state_dict() if name not in every})
    return places


def owners(model: Any) -> dict[str, torch.Tensor]:
    """Return parameters and persistent buffers by their names in memory, detached, tied once."""
    parameters: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=True))
    every = dict(model.named_parameters(remove_duplicate=False))
    buffers = {name: t for name, t in model.state_dict().items() if name not in every}
    return {name: tensor.detach() for name, tensor in (parameters | buffers).items()}


def stream(
    model: Any, places: dict[str, Place], dtype: torch.dtype | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every published tensor, whole; of sharded owners one at a time is gathered.

    A collective where the model is sharded: every rank must run it to its end. `dtype`: of the
    published values where the memory holds float32 masters.
    """
    held, whole_name, whole = owners(model), "", torch.empty(0)
    for name, place in places.items():
        if place.owner != whole_name:
            owner = held[place.owner]
            if isinstance(owner, DTensor):
                owner = owner.full_tensor()
            if dtype is not None and owner.is_floating_point():
                owner = owner.to(dtype)
            whole_name, whole = place.owner, owner
        yield name, place.of(whole)


def write(owner: torch.Tensor, place: Place, value: torch.Tensor) -> None:
    """Copy a published tensor to its place; of a sharded owner only this rank's rows."""
    if not isinstance(owner, DTensor):
        place.of(owner).copy_(value)
        return
    local = owner.to_local()
    start = first_row(owner)
    stop = start + local.shape[0]
    if place.index is None:
        local.copy_(value[start:stop])
    elif start <= place.index < stop:
        Place(place.owner, place.index - start, place.rows).of(local).copy_(value)


def first_row(owner: DTensor) -> int:
    """Return which row of the whole tensor is the first of this rank's (chunks of equal size)."""
    mesh = owner.device_mesh
    return min(owner.shape[0], mesh.get_local_rank() * -(-owner.shape[0] // mesh.size()))


def _expert_places(name: str, parameter: torch.Tensor) -> dict[str, Place]:
    """Return the places of stacked experts, {} for any other parameter."""
    module, _, kind = name.rpartition(".")
    if not module.endswith(".experts") or parameter.ndim != 3:
        return {}
    places: dict[str, Place] = {}
    for expert in range(parameter.shape[0]):
        if kind == "gate_up_proj":
            half = parameter.shape[1] // 2
            places[f"{module}.{expert}.gate_proj.weight"] = Place(name, expert, (0, half))
            places[f"{module}.{expert}.up_proj.weight"] = Place(name, expert, (half, 2 * half))
        elif kind == "down_proj":
            places[f"{module}.{expert}.down_proj.weight"] = Place(name, expert)
    return places
