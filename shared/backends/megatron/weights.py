"""A model's Hugging Face tensors, gathered from and cut over the ranks of a layout.

One entry at a time: the tensor-parallel ranks of the stage that holds it join their parts, and the
first of them broadcasts the result to all ranks. Nobody ever holds more than one entry whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist

from shared.backends.megatron import core
from shared.backends.megatron.building import Ranks
from shared.backends.megatron.layout import Shape
from shared.backends.megatron.mapping import Entry, cut, entries, hf_shapes, join

Part = Callable[[Entry, torch.nn.Parameter], torch.Tensor]
"""What of a parameter is gathered: its values, or a moment of the same shape."""


def values(entry: Entry, parameter: torch.nn.Parameter) -> torch.Tensor:
    """Gather the parameter itself."""
    return parameter.detach()


class ShardedWeights:
    """Where each entry lies on this rank, and who speaks for it."""

    def __init__(self, shape: Shape, ranks: Ranks, model: Any) -> None:
        self.shape = shape
        self._ranks = ranks
        self._named: dict[str, torch.nn.Parameter] = dict(model.named_parameters())
        self._shapes = hf_shapes(shape)
        self._places: list[tuple[int, int, int] | None] = [None] * dist.get_world_size()
        dist.all_gather_object(self._places, (ranks.pp, ranks.tp, ranks.ep))
        found = {id(p) for entry in entries(shape) for p in self.copies(entry)}
        unmapped = sorted(name for name, p in self._named.items() if id(p) not in found)
        if unmapped:
            raise ValueError(f"megatron-core has {unmapped[0]}, which no Hugging Face tensor is")

    @property
    def entries(self) -> Iterator[Entry]:
        """Every parameter of the model, in the same order on every rank."""
        return entries(self.shape)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every Hugging Face tensor."""
        return self._shapes

    def copies(self, entry: Entry) -> list[torch.nn.Parameter]:
        """Return this rank's parameters for an entry: none, one, or a tied head beside it."""
        names = list(entry.names)
        if entry.layer is not None:
            layer = entry.layer - self._ranks.pp * self._layers_per_stage
            expert = 0 if entry.expert is None else entry.expert - self._first_expert
            if not 0 <= layer < self._layers_per_stage:
                return []
            if entry.expert is not None and not 0 <= expert < self._experts_per_rank:
                return []
            names = [name.format(layer=layer, expert=expert) for name in names]
        elif self.shape.tied and entry.tensors == ("model.embed_tokens.weight",):
            names.append("output_layer.weight")
        return [self._named[name] for name in names if name in self._named]

    def write(self, entry: Entry, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy Hugging Face tensors into this rank's part of an entry."""
        for parameter in self.copies(entry):
            with torch.no_grad():
                parameter.copy_(self.part(entry, tensors))

    def part(self, entry: Entry, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return this rank's part of an entry."""
        rank, ranks = self._share(entry)
        return cut(entry, [tensors[name] for name in entry.tensors], self.shape, rank, ranks)

    def stream(self, part: Part, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield every Hugging Face tensor on every rank; all must run it to the end."""
        for entry in self.entries:
            speaker, whole = self._speaker(entry), self._joined(entry, part)
            for number, name in enumerate(entry.tensors):
                tensor = torch.empty(self._shapes[name], dtype=dtype, device=self.device)
                if whole and dist.get_rank() == speaker:
                    tensor.copy_(whole[number])
                dist.broadcast(tensor, src=speaker)
                yield name, tensor

    def _joined(self, entry: Entry, part: Part) -> list[torch.Tensor]:
        copies = self.copies(entry)
        if not copies or not self._speaks_for(entry):
            return []
        mine = part(entry, copies[0]).contiguous()
        _, ranks = self._share(entry)
        if ranks == 1 or entry.cut in ("whole", "rows"):
            return join(entry, [mine], self.shape)
        parts = [torch.empty_like(mine) for _ in range(ranks)]
        group = core.parallel_state.get_tensor_model_parallel_group()
        dist.all_gather(parts, mine, group=group)
        return join(entry, parts, self.shape)

    def _speaks_for(self, entry: Entry) -> bool:
        """Whether this rank is on the stage that publishes the entry (not on a tied copy's)."""
        return self._ranks.pp == self._stage(entry)

    def _stage(self, entry: Entry) -> int:
        if entry.layer is not None:
            return entry.layer // self._layers_per_stage
        return self._ranks.layout.pp - 1 if entry.last else 0

    def _speaker(self, entry: Entry) -> int:
        """Return the lowest rank that has the entry, of the first tensor-parallel share."""
        stage = self._stage(entry)
        for rank, place in enumerate(self._places):
            assert place is not None
            expert_here = entry.expert is None or place[2] == entry.expert // self._experts_per_rank
            if place[0] == stage and expert_here and (place[1] == 0 or entry.expert is not None):
                return rank
        raise AssertionError(entry)

    def _share(self, entry: Entry) -> tuple[int, int]:
        """Return (rank, ranks) that an entry is cut over."""
        return (self._ranks.tp, self._ranks.layout.tp) if entry.expert is None else (0, 1)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(iter(self._named.values())).device

    @property
    def _layers_per_stage(self) -> int:
        return self.shape.num_layers // self._ranks.layout.pp

    @property
    def _experts_per_rank(self) -> int:
        return max(1, self.shape.num_experts // self._ranks.layout.ep)

    @property
    def _first_expert(self) -> int:
        return self._ranks.ep * self._experts_per_rank
