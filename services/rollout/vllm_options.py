# pyright: reportMissingImports=false
"""What vLLM is started with, and the models that it cannot compute."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from services.rollout.vllm_names import BACKEND, ROUTING, WORKER_EXTENSION
from shared.weights.qwen3_layout import Qwen3Shape, qwen3_layout

ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    # One engine process on one device; several start workers of their own.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # Several rollouts share a machine: vLLM would bind each of them to the same first cores.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "TORCHDYNAMO_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
}
"""Set where the environment does not say otherwise, before vLLM is imported."""

RECORDING_ENVIRONMENT = {"VLLM_USE_V2_MODEL_RUNNER": "0"}
"""Set where routing is recorded: by the steps of the older model runner."""


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """What vLLM is started with; see `VllmSection` for the meaning."""

    model_dir: Path
    dtype: Literal["bfloat16", "float32"]
    context_tokens: int
    max_running: int
    step_tokens: int
    tensor_parallel_size: int = 1
    kv_cache_bytes: int = 0
    gpu_memory_utilization: float = 0.9
    block_tokens: int = 32
    shared_dir: Path = Path("/dev/shm")
    record_routing: bool = False
    """Record which experts the router takes for every token."""
    scheduler_class: str = ""
    """Import path of a scheduler, for tests that hold turns at a token boundary."""


def published_shapes(raw: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a model's published tensors from its `config.json`."""
    return qwen3_layout(Qwen3Shape.of(raw), 0, 1).sources


def engine_arguments(options: ServerOptions) -> Any:
    """Return vLLM's `AsyncEngineArgs`."""
    from vllm.config import WeightTransferConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform

    on_cpu = current_platform.is_cpu()
    more: dict[str, Any] = {}
    if options.kv_cache_bytes or on_cpu:
        more["kv_cache_memory_bytes"] = options.kv_cache_bytes or 256 << 20
    if options.tensor_parallel_size == 1:
        more["distributed_executor_backend"] = "uni"
    if options.record_routing:
        more["additional_config"] = {ROUTING: True}
    if options.scheduler_class:
        more["scheduler_cls"] = options.scheduler_class
    return AsyncEngineArgs(
        model=str(options.model_dir),
        served_model_name="policy",
        skip_tokenizer_init=True,
        load_format="dummy",  # the weights come over the bus
        dtype=options.dtype,
        max_model_len=options.context_tokens,
        max_num_seqs=options.max_running,
        max_num_batched_tokens=max(options.step_tokens, options.max_running),
        block_size=options.block_tokens,
        tensor_parallel_size=options.tensor_parallel_size,
        gpu_memory_utilization=options.gpu_memory_utilization,
        enforce_eager=on_cpu,
        enable_prefix_caching=True,
        logprobs_mode="processed_logprobs",
        generation_config="vllm",
        weight_transfer_config=WeightTransferConfig(backend=BACKEND),
        worker_extension_cls=WORKER_EXTENSION,
        **more,
    )


def choose_start_method() -> None:
    """Fork the engine where that is safe: it saves the second import of everything, seconds of CPU.

    To be called once vLLM has made its configuration, which asks for `spawn` on CPUs for the sake
    of compiler threads that eager execution does not have. With several OpenMP threads it stays:
    a forked child whose parent has used them hangs. It stays, too, once numba is here (deltas of
    large models are applied by it): vLLM looks through the modules it finds at its start for
    kernels, and stumbles over numba's.
    """
    from vllm.platforms import current_platform

    one_thread = os.environ.get("OMP_NUM_THREADS") == "1"
    if current_platform.is_cpu() and one_thread and "llvmlite" not in sys.modules:
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
    elif current_platform.is_cpu():
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"


def check_records(shape: Qwen3Shape, model_dir: Path) -> None:
    """Refuse to record the routing of a model that does not route.

    Raises:
        ValueError: with what to do.
    """
    if not shape.moe_layers:
        raise ValueError(f"{model_dir} has no experts to record: take model.routing: recompute")


def check_head_size(head_dim: int) -> None:
    """Refuse heads that the attention of this platform does not compute.

    Raises:
        ValueError: with the sizes that it does.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    known = CPUAttentionBackend.get_supported_head_sizes()
    if head_dim not in known:
        raise ValueError(
            f"head_dim {head_dim}: vLLM on CPUs computes {', '.join(map(str, known))}; "
            "take another model, or rollout.engine: torch"
        )


def read_config(model_dir: Path) -> dict[str, Any]:
    """Read the `config.json` of a Hugging Face directory.

    Raises:
        ValueError: missing, unreadable or no object; one line.
    """
    file = model_dir / "config.json"
    try:
        raw = json.loads(file.read_text())
    except OSError as error:
        raise ValueError(f"model {model_dir}: no readable config.json: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{file}: not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{file}: not a JSON object")
    return raw
