# pyright: reportMissingImports=false
"""In the engine's processes: the experts that vLLM's routers choose, step by step.

Routers write into one buffer, in operations that a CUDA graph may capture, which is why they are
bound before graphs are; after each step the buffer's rows go to the slots of the step's tokens.
vLLM's own way of returning them knows neither versions nor requests that end early.

Shapes: T tokens of a step at most, L layers with experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.layer import MoERunner
from vllm.model_executor.layers.fused_moe.routed_experts_capturer import (
    bind_routed_experts_capturer,
)

from services.rollout.vllm_names import ROUTING_HELD, ROUTING_KEY
from services.rollout.vllm_recorder import RoutingRecorder, SlotRows

MAX_ENDED = 4096
"""Ended requests whose rows may wait to be taken. Turns are short and the rollout may be busy: that
many end before it comes; of cancelled ones it says so. The bound is for what nobody foresaw."""


class RouterOutputs:
    """What the routers of a model chose in the latest step, by layer."""

    def __init__(self, model: torch.nn.Module, vllm_config: Any, device: torch.device) -> None:
        runners: list[Any] = [m for m in model.modules() if isinstance(m, MoERunner)]
        layers = sorted(runner.layer_id for runner in runners)
        self._index = {layer: index for index, layer in enumerate(layers)}
        self.num_experts: int = vllm_config.model_config.get_num_experts()
        choices: int = vllm_config.model_config.get_num_experts_per_tok()
        tokens: int = vllm_config.scheduler_config.max_num_batched_tokens
        self.rows_TLK = torch.zeros(
            (tokens, len(layers), choices), dtype=torch.int32, device=device
        )
        bind_routed_experts_capturer(model, self)

    def capture(self, layer_id: int, experts_TK: torch.Tensor) -> None:
        """Take in the choices of one layer; called inside the forward."""
        self.rows_TLK[: len(experts_TK), self._index[layer_id]] = experts_TK


def install_recorder(runner: Any, outputs: RouterOutputs) -> RoutingRecorder:
    """Make a model runner (the older of vLLM's two) tell a new recorder of its steps."""
    groups = runner.kv_cache_config.kv_cache_groups
    assert len(groups) == 1, "one kind of attention"
    block_tokens = groups[0].kv_cache_spec.block_size
    num_slots = runner.kv_cache_config.num_blocks * block_tokens
    shape = (num_slots, *outputs.rows_TLK.shape[1:])

    def blocks_of(request_id: str) -> Sequence[int]:
        return runner.requests[request_id].block_ids[0]

    recorder = RoutingRecorder(
        SlotRows(shape, outputs.num_experts, outputs.rows_TLK.device),
        block_tokens,
        blocks_of,
        max_ended=MAX_ENDED,
    )
    native = runner.execute_model

    def execute_model(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        # Before the runner hears of it: blocks of these may be written to in this very step.
        for request_id in scheduler_output.preempted_req_ids or ():
            recorder.lose_blocks(request_id)
        for request_id in scheduler_output.finished_req_ids:
            recorder.end(request_id)
        result = native(scheduler_output, *args, **kwargs)
        if scheduler_output.total_num_scheduled_tokens:
            _record(runner, outputs, recorder, scheduler_output)
        return result

    runner.execute_model = execute_model
    return recorder


def _record(
    runner: Any, outputs: RouterOutputs, recorder: RoutingRecorder, scheduler_output: Any
) -> None:
    total = scheduler_output.total_num_scheduled_tokens
    slots_T = runner.input_batch.block_table[0].slot_mapping.gpu[:total]
    recorder.put(slots_T, outputs.rows_TLK[:total])
    anew = {new.req_id for new in scheduler_output.scheduled_new_reqs}
    anew |= scheduler_output.scheduled_cached_reqs.resumed_req_ids
    for request_id, count in scheduler_output.num_scheduled_tokens.items():
        state = runner.requests[request_id]
        extra = state.sampling_params.extra_args or {}
        if (key := extra.get(ROUTING_KEY)) is not None:
            begin, held = state.num_computed_tokens, extra.get(ROUTING_HELD)
            recorder.forwarded(
                request_id,
                key,
                begin,
                begin + count,
                anew=request_id in anew,
                held=None if held is None else (held[0], held[1]),
            )
