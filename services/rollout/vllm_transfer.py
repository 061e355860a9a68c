# pyright: reportMissingImports=false, reportUntypedBaseClass=false
"""In the engine's processes: published tensors from shared memory into vLLM's model.

A backend of vLLM's weight transfer (`vllm.distributed.weight_transfer`), so that updates run
through its own four phases: init, start, update, finish. Loading is vLLM's layerwise reload, which
fuses, shards and packs as at start. Four things it does not do are done here:

* A module is loaded as a whole: one whose q_proj alone changed would get an undefined k and v.
* A tied head keeps the packed copy of its *old* weights on CPUs: it is packed again.
* Experts keep their first packing on CPUs: `vllm_experts.py` has them packed by every load.
* Nothing is believed: `loading_check.py` compares what each module loaded and packed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from services.rollout.loading_check import LoadingCheck
from services.rollout.shared_tensors import SharedTensors
from services.rollout.vllm_experts import pack_every_load, packing
from services.rollout.vllm_names import BACKEND, ROUTING
from services.rollout.vllm_recorder import RoutingRecorder
from services.rollout.vllm_routing import RouterOutputs
from shared.weights.layouts import Layout
from shared.weights.qwen3_layout import EMBED, HEAD, Qwen3Shape, qwen3_layout


@dataclass
class AreaInfo(WeightTransferInitInfo):
    """Where the tensors lie."""

    path: str


@dataclass
class ChangedNames(WeightTransferUpdateInfo):
    """Which of them differ from what the engine holds."""

    names: list[str]
    label: str = ""
    """Of the version; needed where routing is recorded."""


class SharedMemoryTransfer(WeightTransferEngine):
    """Loads what changed of a version from the file that `AreaInfo` names."""

    init_info_cls = AreaInfo
    update_info_cls = ChangedNames
    supports_draft_weight_update = False

    def __init__(
        self, config: Any, vllm_config: Any, device: torch.device, model: torch.nn.Module
    ) -> None:
        super().__init__(config, vllm_config, device, model)
        raw = json.loads((Path(self.model_config.model) / "config.json").read_text())
        shape = Qwen3Shape.of(raw)
        self._tied = shape.tied
        self._shapes = qwen3_layout(shape, 0, 1).sources
        num_ranks = self.parallel_config.tensor_parallel_size
        rank = get_tensor_model_parallel_rank()
        self._layout = qwen3_layout(shape, rank, num_ranks)
        pack_every_load(model)
        self.check = LoadingCheck(model, self._layout, packing)
        # Here: the model is made, its graphs are not captured yet. All ranks route alike.
        records = vllm_config.additional_config.get(ROUTING) and rank == 0
        self.router_outputs = RouterOutputs(model, vllm_config, device) if records else None
        self._modules = sources_by_module(self._layout)
        self._loaded: set[str] = set()
        """Modules of the update in progress."""
        self._label = ""
        """Of the update in progress."""
        self.recorder: RoutingRecorder | None = None
        self._area: SharedTensors | None = None

    def init_transfer_engine(self, init_info: AreaInfo) -> None:
        path = Path(init_info.path)
        self._area = SharedTensors(path, self._shapes, self.model_config.dtype, create=False)

    def start_weight_update(self) -> None:
        self._loaded = set()
        if self.recorder is not None:
            self.recorder.begin_update()
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: ChangedNames) -> None:
        assert self._area is not None, "init_transfer_engine comes first"
        tensors = self._area.tensors
        modules = modules_to_load(self._modules, update_info.names)
        self._loaded.update(modules)
        self._label = update_info.label
        with self.check.watching(tensors):
            self.model.load_weights(
                (name, tensors[name]) for module in modules for name in self._modules[module]
            )

    def finish_weight_update(self) -> None:
        assert self._area is not None, "init_transfer_engine comes first"
        with self.check.watching(self._area.tensors):
            finalize_layerwise_reload(self.model, self.model_config)
            if self._tied and EMBED.removesuffix(".weight") in self._loaded:
                self._pack_head()
        self.check.compare(self._loaded, self._area.tensors)
        if self.recorder is not None:
            self.recorder.finish_update(self._label)

    def shutdown(self) -> None:
        self._area = None

    def _pack_head(self) -> None:
        head = self.model.get_submodule(HEAD.removesuffix(".weight"))
        head.quant_method.process_weights_after_loading(head)


def sources_by_module(layout: Layout) -> dict[str, tuple[str, ...]]:
    """Return the published tensors that each module of the engine is loaded from."""
    modules: dict[str, dict[str, None]] = {}
    for local, placement in layout.placements():
        modules.setdefault(local.rpartition(".")[0], {})[placement.source] = None
    return {module: tuple(sources) for module, sources in modules.items()}


def modules_to_load(sources: dict[str, tuple[str, ...]], changed: Iterable[str]) -> tuple[str, ...]:
    """Return the modules of which anything changed, in the model's order."""
    names = set(changed)
    return tuple(module for module, parts in sources.items() if names.intersection(parts))


def register_backend() -> None:
    """Make vLLM find the backend by its name; once per process."""
    WeightTransferEngineFactory.register_engine(BACKEND, SharedMemoryTransfer)
