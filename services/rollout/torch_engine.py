"""The CPU default engine: continuous batching over `qwen3_forward`, one step at a time.

One loop: consumes submitted turns; waits for work; unblocked by `sample` or `close`; produces one
token per ready row and step. It yields to the event loop between steps, so every call from
outside (`update`, `interrupt`) happens at a token boundary.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from services.rollout.engine import EngineDead, EngineLoad, SampleResult, SampleSpec
from services.rollout.prefix_cache import PrefixCache
from services.rollout.qwen3_config import read_config
from services.rollout.qwen3_forward import KvCache, Qwen3Forward, score_sequences
from services.rollout.qwen3_weights import DeviceWeights, cast_state
from services.rollout.request_check import check_spec
from services.rollout.routing_rows import RoutingRows
from services.rollout.sampling import draw, seed_bits, uniforms
from services.rollout.scheduler import Finish, Row, Scheduler
from services.rollout.step_layout import laid_out, row_group
from shared.wire.base import Array
from shared.wire.messages import SampledTokens
from shared.wire.trajectory import Span

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}

_YIELDS = 3
"""Turns of the event loop between steps. A message passes socket, parser and handler in three
turns: with one, a request would wait for three steps before it is seen."""


class TorchEngine:
    """Samples from a Qwen3, dense or with experts, given as `config.json` and published states.

    Args:
        model_dir: Hugging Face directory; only its `config.json` is read.
        dtype: compute dtype of weights, activations and KV cache.
        context_tokens: longest prefix plus answer.
        max_running: turns sampled at once.
        kv_slots: running turns plus finished prefixes kept for reuse.
        step_tokens: most tokens forwarded in one step.
        record_routing: answer with the experts that the router chose.

    Raises:
        ValueError: the model cannot be computed, its positions are fewer than the context, or it
            has no experts whose routing could be recorded.
    """

    def __init__(
        self,
        model_dir: Path,
        *,
        dtype: Literal["bfloat16", "float32", "float64"] = "bfloat16",
        context_tokens: int = 192,
        max_running: int = 128,
        kv_slots: int = 256,
        step_tokens: int = 1024,
        record_routing: bool = False,
    ) -> None:
        config = read_config(model_dir)
        if record_routing and not config.expert_layers:
            raise ValueError(
                f"model.routing: replay: {model_dir} has no experts; take model.routing: recompute"
            )
        if context_tokens > config.max_positions:
            raise ValueError(
                f"context_tokens {context_tokens} exceeds the model's {config.max_positions} "
                f"positions ({model_dir})"
            )
        self.context_tokens = context_tokens
        self.dtype = DTYPES[dtype]
        self._vocab_size = config.vocab_size
        self._weights = DeviceWeights(config, self.dtype)
        cache = KvCache(config, kv_slots, context_tokens, self.dtype)
        self._routing = RoutingRows(config, kv_slots, context_tokens) if record_routing else None
        self._forward = Qwen3Forward(self._weights, cache, self._routing)
        self._scheduler = Scheduler(
            PrefixCache(kv_slots), max_running=max_running, step_tokens=step_tokens
        )
        self._version = -1
        self._results: dict[str, asyncio.Future[SampleResult]] = {}
        self._work = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._dead = ""
        self._counters = dict.fromkeys(
            ("sampled_tokens", "prefill_tokens", "steps", "swaps", "swap_s", "busy_s"), 0.0
        )

    @property
    def version(self) -> int:
        return self._version

    @property
    def failure(self) -> str:
        return self._dead

    async def start(self) -> None:
        """Start the stepping loop."""
        self._task = asyncio.get_running_loop().create_task(self._run(), name="torch-engine")

    async def sample(self, spec: SampleSpec) -> SampleResult:
        self._refuse_if_dead()
        row = self._row(spec)
        self._scheduler.submit(row)
        future: asyncio.Future[SampleResult] = asyncio.get_running_loop().create_future()
        self._results[spec.request_id] = future
        self._work.set()
        try:
            return await future
        finally:
            # Cancelled from outside: nobody takes the result, the row must not go on.
            if self._results.pop(spec.request_id, None) is not None:
                self._scheduler.finish(row)

    async def update(
        self, version: int, state: Mapping[str, torch.Tensor], changed: Set[str] | None
    ) -> None:
        self._refuse_if_dead()
        self._weights.check(state)
        names = self._weights.names if changed is None else self._weights.names & changed
        started = time.perf_counter()
        cast = cast_state(state, names, self.dtype)
        # Nothing below awaits: the swap is one event, between two steps.
        for row in self._scheduler.running:
            self._take_routing(row)
        self._version = -1
        try:
            self._weights.write(cast)
        except Exception as error:
            self._die(f"the swap to version {version} failed half-way: {error}")
            raise EngineDead(self._dead) from error
        self._forget_keys_and_values()
        self._version = version
        self._counters["swaps"] += 1
        self._counters["swap_s"] += time.perf_counter() - started
        self._work.set()

    def device_digest(self) -> str:
        return self._weights.digest()

    async def score(self, token_ids: Sequence[npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
        """See `ScoringEngine`; a cache of its own, so that no running turn sees it."""
        self._refuse_if_dead()
        return score_sequences(self._weights, token_ids)

    def interrupt(self, request_id: str | None = None) -> None:
        chosen = self._scheduler.request_ids if request_id is None else (request_id,)
        for chosen_id in chosen:
            row = self._scheduler.row(chosen_id)
            if row is not None:
                self._finish(row, "interrupted")

    def num_sampled(self, request_id: str) -> int:
        row = self._scheduler.row(request_id)
        return 0 if row is None else row.num_sampled

    def load(self) -> EngineLoad:
        hits = {"prefix_hit_tokens": float(self._scheduler.prefix_hit_tokens)}
        return EngineLoad(
            running=self._scheduler.num_running,
            waiting=self._scheduler.num_waiting,
            kv_used_ratio=self._scheduler.kv_used_ratio,
            counters=self._counters | hits,
        )

    async def close(self) -> None:
        """Stop stepping; whoever still waits gets `EngineDead`."""
        self._die("the engine was closed")
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    # --- inside
    def _row(self, spec: SampleSpec) -> Row:
        check_spec(spec, context_tokens=self.context_tokens, vocab_size=self._vocab_size)
        return Row(
            request_id=spec.request_id,
            tokens=list(spec.token_ids),
            max_new_tokens=spec.max_new_tokens,
            stop_ids=frozenset(spec.sampling.stop_ids),
            temperature=spec.sampling.temperature,
            seed=seed_bits(spec.seed),
            seed_offset=spec.seed_offset,
            routing_held=spec.routing_held,
        )

    async def _run(self) -> None:
        while not self._dead:
            if self._scheduler.idle or self._version < 0:
                self._work.clear()
                await self._work.wait()
                continue
            # Whatever a step raises ends the engine with that reason; the pod restarts it.
            started = time.thread_time()
            try:
                self._step()
            except Exception as error:  # noqa: BLE001 - reported to every caller as EngineDead
                self._die(f"{type(error).__name__}: {error}")
            self._counters["busy_s"] += time.thread_time() - started
            for _ in range(_YIELDS):
                await asyncio.sleep(0)

    def _step(self) -> None:
        groups = self._scheduler.plan()
        works = [work for group in groups for work in group]
        wanted, ids, num_tokens = laid_out(works)
        logits = self._forward(
            np.array(ids, dtype=np.int64),
            [row_group(group) for group in groups],
            np.array(wanted, dtype=np.int64),
        )
        for work in works:
            self._scheduler.forwarded(work)
        rows = [work.row for work in works if work.samples]
        self._counters["steps"] += 1
        self._counters["prefill_tokens"] += num_tokens - len(rows)
        if rows:
            self._sample(rows, logits)

    def _sample(self, rows: list[Row], logits: torch.Tensor) -> None:
        indices = [row.seed_offset + row.num_sampled for row in rows]
        numbers = uniforms(
            np.array([row.seed for row in rows], dtype=np.uint64),
            np.array(indices, dtype=np.uint64),
        )
        temperatures = np.array([row.temperature for row in rows])
        tokens, logprobs = draw(logits, temperatures, numbers)
        if not np.isfinite(logprobs).all():
            raise FloatingPointError(f"logits of version {self._version} are not finite")
        self._counters["sampled_tokens"] += len(rows)
        for row, token, logprob in zip(rows, tokens.tolist(), logprobs.tolist(), strict=True):
            finish = row.take(token, logprob, self._version)
            if finish is not None:
                self._finish(row, finish)

    def _finish(self, row: Row, finish: Finish) -> None:
        self._take_routing(row)
        self._scheduler.finish(row)
        future = self._results.pop(row.request_id)
        if not future.done():
            future.set_result(SampleResult(_sampled(row, self.dtype), finish))

    def _take_routing(self, row: Row) -> None:
        """Copy the routing under the present version out of the row's slot."""
        if self._routing is None:
            return
        start, stop = row.unrecorded(self._version)
        if start < stop:
            row.routing.append(self._routing.record(row.slot, start, stop, self._version))

    def _forget_keys_and_values(self) -> None:
        """Make no token of the new version depend on keys and values of an older one."""
        self._scheduler.weights_changed()

    def _refuse_if_dead(self) -> None:
        if self._dead:
            raise EngineDead(self._dead)

    def _die(self, reason: str) -> None:
        if self._dead:
            return
        self._dead = reason
        self._version = -1
        results, self._results = self._results, {}
        for future in results.values():
            if not future.done():
                future.set_exception(EngineDead(reason))
        self._work.set()


def _sampled(row: Row, dtype: torch.dtype) -> SampledTokens:
    return SampledTokens(
        token_ids=Array.of(row.tokens[row.num_prefix :], "i4"),
        logprobs=Array.of(row.logprobs, "f8" if dtype == torch.float64 else "f4"),
        spans=tuple(Span(version=v, start=a, stop=b) for v, a, b in row.spans),
        routing=tuple(row.routing),
    )
