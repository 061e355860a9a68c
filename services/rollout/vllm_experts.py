# pyright: reportMissingImports=false
"""In the engine's processes: experts on CPUs, whose kernel computes with packed weights.

vLLM packs them in place once, when it builds the kernel, and leaves every later load as it came:
the kernel would then read plain rows as packed ones. `pack_every_load` has the kernel built anew
by each load; `packing` says what the packed weights must be, for `loading_check.py`.

Shapes: E experts, F and P their inner size as loaded and as padded, H hidden.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import pad
from vllm._custom_ops import cpu_prepack_moe_weight
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

from services.rollout.loading_check import Pack


def pack_every_load(model: torch.nn.Module) -> None:
    """Make vLLM's layerwise reload pack the experts of a CPU's model."""
    for module in model.modules():
        if _experts_of(module) is not None:
            method: Any = module.quant_method
            load = method.process_weights_after_loading
            method.process_weights_after_loading = functools.partial(_load_anew, method, load)


def packing(module: torch.nn.Module, name: str) -> Pack | None:
    """Return how the kernel of a module lays out a parameter; None: as it was loaded."""
    experts = _experts_of(module)
    if experts is None or name not in _PADDED or experts._use_zentorch:
        return None
    width = experts._padded_intermediate_size(experts.moe_config)

    def pack(loaded: torch.Tensor) -> torch.Tensor:
        padded = _PADDED[name](loaded, width)
        return cpu_prepack_moe_weight(padded.contiguous(), experts.isa)

    return pack


def _load_anew(
    method: Any, load: Callable[[torch.nn.Module], None], module: torch.nn.Module
) -> None:
    method.moe_kernel = None
    load(module)


def _experts_of(module: torch.nn.Module) -> Any:
    kernel = getattr(getattr(module, "quant_method", None), "moe_kernel", None)
    experts = getattr(kernel, "fused_experts", None)
    return experts if isinstance(experts, CPUUnquantizedExperts) else None


def _pad_rows(w13_EFH: torch.Tensor, width: int) -> torch.Tensor:
    """[E, 2 F, H], gate over up, to [E, 2 P, H]."""
    halves = w13_EFH.unflatten(1, (2, -1))
    return pad(halves, (0, 0, 0, width - halves.shape[2])).flatten(1, 2)


def _pad_columns(w2_EHF: torch.Tensor, width: int) -> torch.Tensor:
    """[E, H, F] to [E, H, P]."""
    return pad(w2_EHF, (0, width - w2_EHF.shape[2]))


_PADDED = {"w13_weight": _pad_rows, "w2_weight": _pad_columns}
