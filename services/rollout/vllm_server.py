# pyright: reportMissingImports=false
"""vLLM's AsyncLLM in this process, its engine core and workers in processes of their own.

Everything that touches vLLM's interfaces from the rollout's side is in this file, written against
0.32.0.
"""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from services.rollout.config import RolloutSection
from services.rollout.engine import EngineDead, EngineLoad, SampleSpec
from services.rollout.sampling import seed_bits
from services.rollout.shared_tensors import SharedTensors
from services.rollout.vllm_engine import VllmEngine
from services.rollout.vllm_names import OWNER_VARIABLE, ROUTING, ROUTING_HELD, ROUTING_KEY
from services.rollout.vllm_options import (
    ENVIRONMENT,
    RECORDING_ENVIRONMENT,
    ServerOptions,
    check_head_size,
    check_records,
    choose_start_method,
    engine_arguments,
    published_shapes,
    read_config,
)
from services.rollout.vllm_port import Output, PauseMode, Recorded, Sync
from shared.weights.qwen3_layout import Qwen3Shape, qwen3_layout
from shared.wire.weights import TensorSpec

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}

CLOSE_S = 1.0


class VllmServer:
    """One engine of vLLM.

    Raises:
        ValueError: a model that the engine cannot hold or compute, named.
    """

    def __init__(self, options: ServerOptions) -> None:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        self._options = options
        raw = read_config(options.model_dir)
        shape = Qwen3Shape.of(raw)
        try:
            qwen3_layout(shape, 0, options.tensor_parallel_size)
        except ValueError as error:
            raise ValueError(f"rollout.vllm.tensor_parallel_size: {error}") from error
        check_head_size(shape.head_dim)
        if options.record_routing:
            check_records(shape, options.model_dir)
            os.environ.update(RECORDING_ENVIRONMENT)
        if options.context_tokens > int(raw["max_position_embeddings"]):
            raise ValueError(
                f"context_tokens {options.context_tokens} exceeds the model's "
                f"{raw['max_position_embeddings']} positions ({options.model_dir})"
            )
        self.shapes: Mapping[str, tuple[int, ...]] = published_shapes(raw)
        self.vocab_size = shape.vocab_size
        self._dtype = DTYPES[options.dtype]
        self._area: SharedTensors | None = None
        self._llm: Any = None
        self._stats: Any = None
        self._seeding = ""
        self._num_scores = 0
        self._num_recorded = 0
        self._calls: set[asyncio.Task[Any]] = set()

    async def start(self) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest
        from vllm.v1.engine.async_llm import AsyncLLM

        from services.rollout.vllm_metrics import EngineStats

        path = self._options.shared_dir / f"lagwise-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._area = SharedTensors(path, self.shapes, self._dtype, create=True)
        os.environ[OWNER_VARIABLE] = str(os.getpid())
        stats = self._stats = EngineStats()

        def build() -> Any:
            config = engine_arguments(self._options).create_engine_config()
            choose_start_method()
            return AsyncLLM.from_vllm_config(
                config, stat_loggers=[stats.logger], disable_log_stats=True
            )

        # In a thread: probes and leases go on meanwhile.
        self._llm = await asyncio.to_thread(build)
        await self._llm.get_supported_tasks()  # asked once, so that requests start at once
        self._seeding = (await self._llm.collective_rpc("lagwise_prepare"))[0]
        await self._llm.init_weight_transfer_engine(
            WeightTransferInitRequest(init_info={"path": str(path)})
        )
        self._area.unlink()  # both sides have it mapped: nothing is left behind by a kill

    async def write(
        self, state: Mapping[str, torch.Tensor], names: Iterable[str]
    ) -> list[TensorSpec]:
        assert self._area is not None
        return await asyncio.to_thread(self._area.write, state, names)

    async def swap(self, names: Sequence[str], label: str) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        llm = self._llm
        await llm.start_weight_update()
        info = {"names": list(names), "label": label}
        await llm.update_weights(WeightTransferUpdateRequest(update_info=info))
        await llm.finish_weight_update(label)

    async def pause(self, mode: PauseMode, *, clear_cache: bool) -> None:
        # AsyncLLM.pause_generation, without its 20 ms of sleep: outputs carry their labels, so that
        # it does not matter when they arrive.
        await self._llm.engine_core.pause_scheduler_async(mode=mode, clear_cache=clear_cache)

    async def resume(self) -> None:
        await self._llm.resume_generation()

    async def generate(self, spec: SampleSpec, salt: str) -> Output:
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind, SamplingParams
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        native = self._seeding == "native"
        seed = seed_bits(spec.seed)
        extra: dict[str, Any] = {}
        if not native:
            extra = {"seed": seed, "seed_offset": spec.seed_offset}
        if self._options.record_routing:
            self._num_recorded += 1
            extra[ROUTING_KEY] = str(self._num_recorded)
            if spec.routing_held is not None:
                version, stop = spec.routing_held
                extra[ROUTING_HELD] = [str(version), stop]
        params = SamplingParams(
            temperature=spec.sampling.temperature,
            max_tokens=spec.max_new_tokens,
            stop_token_ids=list(spec.sampling.stop_ids),
            ignore_eos=True,  # a turn ends where its request says
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            seed=seed >> 1 if native else None,
            extra_args=extra or None,
            skip_clone=True,
        )
        prompt = tokens_input(list(spec.token_ids), cache_salt=salt)
        final: Any = None
        try:
            async for output in self._llm.generate(prompt, params, spec.request_id):
                final = output.outputs[0]
            routing = await self._routing_of(extra.get(ROUTING_KEY))
        except asyncio.CancelledError:
            self._forget(extra.get(ROUTING_KEY))
            raise
        except EngineDeadError as error:
            raise EngineDead(self.failure() or "the engine process is gone") from error
        except EngineGenerateError as error:
            raise EngineDead(f"the engine failed: {error.__cause__}") from error
        if final is None:
            return Output((), (), (), "interrupted")
        finish = "interrupted" if final.finish_reason == "abort" else final.finish_reason
        return Output(
            token_ids=final.token_ids,
            logprobs=final.logprobs.logprobs if final.logprobs else (),
            labels=[(s.version, s.start, s.end) for s in final.weight_versions or ()],
            finish=finish,
            routing=routing,
        )

    async def _routing_of(self, key: str | None) -> list[Recorded]:
        """Take what the worker recorded of a request that ended."""
        from vllm.v1.engine.exceptions import EngineDeadError

        if key is None:
            return []
        try:
            parts = (await self._llm.collective_rpc(ROUTING, args=(key,)))[0]
        except EngineDeadError:
            raise
        except Exception as error:
            raise EngineDead(f"the engine does not say its routing: {error}") from error
        return [
            Recorded(label, start, np.frombuffer(data, dtype).reshape(shape))
            for label, start, dtype, shape, data in parts
        ]

    def _forget(self, key: str | None) -> None:
        """Have the worker forget the rows of a request that nobody waits for any more."""
        if key is not None and self._llm is not None:
            self._background(self._llm.collective_rpc(ROUTING, args=(key,)))

    def _background(self, call: Coroutine[Any, Any, Any]) -> None:
        """Let a call run to its end; it fails only where the engine does, which is seen anyway."""
        task = asyncio.get_running_loop().create_task(call)
        self._calls.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._calls.discard(task)
        if not task.cancelled():
            task.exception()

    async def score(self, token_ids: Sequence[int]) -> list[float]:
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        if len(token_ids) < 2:
            return [0.0] * len(token_ids)
        self._num_scores += 1
        params = SamplingParams(
            temperature=1.0,
            max_tokens=1,
            prompt_logprobs=0,
            detokenize=False,
            ignore_eos=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        prompt = tokens_input(list(token_ids))
        final: Any = None
        async for output in self._llm.generate(prompt, params, f"score-{self._num_scores}"):
            final = output
        rows = final.prompt_logprobs
        chosen = zip(token_ids[1:], rows[1:], strict=True)
        return [0.0, *(row[token].logprob for token, row in chosen)]

    def abort(self, request_id: str) -> None:
        if self._llm is None:
            return
        self._background(self._llm.abort(request_id))

    def num_sampled(self, request_id: str) -> int:
        if self._llm is None:
            return 0
        processor = self._llm.output_processor
        for internal in processor.external_req_ids.get(request_id, ()):
            state = processor.request_states.get(internal)
            if state is not None:
                return int(state.detokenizer.num_output_tokens())
        return 0

    def load(self) -> EngineLoad:
        if self._llm is None:
            return EngineLoad(0, 0, 0.0)
        # The engine reports after its steps only, and takes none when the last turn was ended.
        return self._stats.load(num_open=self._llm.output_processor.get_num_unfinished_requests())

    def failure(self) -> str:
        if self._llm is not None and self._llm.errored:
            return "the engine process ended"
        return ""

    async def close(self) -> None:
        llm, self._llm = self._llm, None
        if llm is not None:
            await asyncio.to_thread(llm.shutdown, CLOSE_S)
        if self._area is not None:
            self._area.unlink()


def make_vllm_engine(
    model_dir: Path, section: RolloutSection, *, context_tokens: int, record_routing: bool = False
) -> VllmEngine:
    """Build the configured engine; `record_routing` for `model.routing: replay`.

    Raises:
        ValueError: a model that the engine cannot hold or compute, named.
    """
    assert section.dtype != "float64"  # refused by the configuration
    server = VllmServer(
        ServerOptions(
            model_dir=model_dir,
            dtype=section.dtype,
            context_tokens=context_tokens,
            max_running=section.max_running,
            step_tokens=section.step_tokens,
            tensor_parallel_size=section.vllm.tensor_parallel_size,
            kv_cache_bytes=section.vllm.kv_cache_bytes,
            gpu_memory_utilization=section.vllm.gpu_memory_utilization,
            block_tokens=section.vllm.block_tokens,
            shared_dir=Path(section.vllm.shared_dir),
            record_routing=record_routing,
        )
    )
    return VllmEngine(
        server,
        dtype=DTYPES[section.dtype],
        context_tokens=context_tokens,
        sync=Sync(**section.sync.model_dump()),
    )
