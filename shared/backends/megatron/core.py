"""The one place that imports megatron-core, adapted to this machine (`cpu.py`)."""

from __future__ import annotations

from importlib import import_module
from typing import Any, cast

from shared.backends.megatron import cpu


def _module(name: str) -> Any:
    try:
        return cast("Any", import_module(f"megatron.core{name}"))
    except ImportError as error:
        raise ValueError(
            f"model.backend megatron needs megatron-core ({error}): install the extra megatron"
        ) from error


with cpu.importing():
    parallel_state = _module(".parallel_state")
    distributed = _module(".distributed")
    finalizing = _module(".distributed.finalize_model_grads")
    specs = _module(".models.gpt.gpt_layer_specs")
    gpt = _module(".models.gpt")
    optimizers = _module(".optimizer")
    packing = _module(".packed_seq_params")
    schedules = _module(".pipeline_parallel.schedules")
    tensor_parallel = _module(".tensor_parallel")
    random = _module(".tensor_parallel.random")
    block = _module(".transformer.transformer_block")
    config = _module(".transformer.transformer_config")
    _module(".transformer.moe.moe_layer")
    _module(".transformer.moe.experts")
    _module(".transformer.moe.token_dispatcher")

cpu.adapt()

HAVE_ENGINE = bool(getattr(specs, "HAVE_TE", False)) and cpu.HAVE_CUDA
"""Whether TransformerEngine's layers are used."""
