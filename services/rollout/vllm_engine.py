"""vLLM behind the `Engine` Protocol: who may sample when, swaps, exact stamps. No vLLM in here.

`VllmServer` (vllm_server.py) is the engine itself, in processes of its own; this class decides what
it is asked. Stamps are the server's: a version label changes only while nothing is computed, and
every output carries the label it was computed under (docs/vllm.md).

Turn: consumes its spec; waits for weights, then for the server; unblocked by an update, an
interruption or the server's death; produces a result. Watch: looks for the server's death.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from services.rollout.engine import EngineDead, EngineLoad, SampleResult, SampleSpec
from services.rollout.request_check import check_spec
from services.rollout.state_check import check_state
from services.rollout.vllm_port import Output, Server, Sync
from services.rollout.vllm_records import records_of
from shared.weights.digests import version_digest
from shared.wire.base import Array
from shared.wire.messages import SampledTokens
from shared.wire.trajectory import Span
from shared.wire.weights import TensorSpec

T = TypeVar("T")

WATCH_S = 0.1
"""How often the server's health is looked at."""


@dataclass(slots=True, eq=False)
class _Turn:
    spec: SampleSpec
    go: asyncio.Event = field(default_factory=asyncio.Event)
    """There are weights, or it is over."""
    task: asyncio.Task[Output] | None = None
    interrupted: bool = False


class VllmEngine:
    """Samples with a server; swaps its weights between tokens.

    Args:
        server: not started.
        dtype: in which it holds the weights.
        context_tokens: longest prefix plus answer.
        sync: what an update does to the turns that run.
    """

    def __init__(
        self, server: Server, *, dtype: torch.dtype, context_tokens: int, sync: Sync
    ) -> None:
        self.context_tokens = context_tokens
        self.dtype = dtype
        self._server = server
        self._sync = sync
        self._version = -1
        self._specs: dict[str, TensorSpec] = {}
        """What the server holds, by published name."""
        self._turns: dict[str, _Turn] = {}
        self._swapping = asyncio.Lock()
        self._watch: asyncio.Task[None] | None = None
        self._calls: set[asyncio.Task[Any]] = set()
        """Swaps and scores in progress, ended by a death."""
        self._dead = ""
        self._counters = dict.fromkeys(("swaps", "swap_s", "pause_s", "mixed_kv_turns"), 0.0)

    @property
    def version(self) -> int:
        return self._version

    @property
    def failure(self) -> str:
        return self._dead

    async def start(self) -> None:
        """Start the server.

        Raises:
            EngineDead: it cannot be started.
        """
        try:
            await self._server.start()
        except Exception as error:
            self._die(f"vLLM did not start: {_line(error)}")
            await self._server.close()
            raise EngineDead(self._dead) from error
        self._watch = asyncio.get_running_loop().create_task(self._look(), name="vllm-watch")

    async def sample(self, spec: SampleSpec) -> SampleResult:
        self._refuse_if_dead()
        check_spec(spec, context_tokens=self.context_tokens, vocab_size=self._server.vocab_size)
        if spec.request_id in self._turns:
            raise ValueError(f"request {spec.request_id!r} is being sampled already")
        turn = self._turns[spec.request_id] = _Turn(spec)
        try:
            while self._version < 0 and not turn.interrupted:
                await turn.go.wait()
                turn.go.clear()
                self._refuse_if_dead()
            if turn.interrupted:
                return SampleResult(_NOTHING, "interrupted")
            began_at = self._version
            output = await self._ended_by_death(turn, self._server.generate(spec, str(began_at)))
        finally:
            del self._turns[spec.request_id]
        return self._result(spec, output, began_at)

    async def update(
        self, version: int, state: Mapping[str, torch.Tensor], changed: Set[str] | None
    ) -> None:
        self._refuse_if_dead()
        check_state(state, self._server.shapes, self.dtype)
        async with self._swapping:
            self._refuse_if_dead()
            names = [n for n in self._server.shapes if changed is None or n in changed]
            try:
                # What takes long is done while sampling goes on.
                written = await self._within(self._server.write(state, names))
                started = time.perf_counter()
                self._version = -1
                await self._swap(version, names)
            except EngineDead:
                raise
            except Exception as error:
                self._die(f"the swap to version {version} failed half-way: {_line(error)}")
                raise EngineDead(self._dead) from error
            self._specs.update({tensor.name: tensor for tensor in written})
            self._version = version
            self._counters["swaps"] += 1
            self._counters["swap_s"] += time.perf_counter() - started
        self._release()

    def device_digest(self) -> str:
        """Digest of what the server loaded: each swap fails unless it is what was written."""
        return version_digest(self._specs.values())

    async def score(self, token_ids: Sequence[npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
        """Return the log-probs, at temperature 1, of sequences under the version in use.

        Per sequence [L] an array [L], its first element 0.

        Raises:
            EngineDead: the engine cannot forward any more.
        """
        self._refuse_if_dead()
        rows = [ids.tolist() for ids in token_ids]
        scored = await self._within(asyncio.gather(*[self._server.score(row) for row in rows]))
        return [np.array(row) for row in scored]

    def interrupt(self, request_id: str | None = None) -> None:
        chosen = tuple(self._turns) if request_id is None else (request_id,)
        for turn in (self._turns[i] for i in chosen if i in self._turns):
            turn.interrupted = True
            if turn.task is None:
                turn.go.set()
            else:
                self._server.abort(turn.spec.request_id)

    def num_sampled(self, request_id: str) -> int:
        return self._server.num_sampled(request_id) if request_id in self._turns else 0

    def load(self) -> EngineLoad:
        load = self._server.load()
        held = sum(turn.task is None for turn in self._turns.values())
        return EngineLoad(
            running=load.running,
            waiting=load.waiting + held,
            kv_used_ratio=load.kv_used_ratio,
            counters=load.counters | self._counters,
        )

    async def close(self) -> None:
        """End the server's processes; whoever still waits gets `EngineDead`."""
        self._die("the engine was closed")
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
            self._watch = None
            await self._server.close()

    # --- swaps
    async def _swap(self, version: int, names: Sequence[str]) -> None:
        """Pause, load, resume; nothing is computed from the first write to the last."""
        paused = time.perf_counter()
        clear = not (self._sync.mode == "keep" and self._sync.keep_kv)
        match self._sync.mode:
            case "keep":
                await self._within(self._server.pause("keep", clear_cache=clear))
            case "interrupt":
                await self._within(self._server.pause("abort", clear_cache=clear))
            case "wait":
                await self._drain()
        self._counters["pause_s"] += time.perf_counter() - paused
        await self._within(self._server.swap(names, str(version)))
        await self._within(self._server.resume())

    async def _drain(self) -> None:
        """Pause once everything has ended; after `wait_s`, end it."""
        pause = asyncio.ensure_future(self._within(self._server.pause("wait", clear_cache=True)))
        with suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(pause), self._sync.wait_s)
        if not pause.done():
            for turn in self._turns.values():
                if turn.task is not None:
                    self._server.abort(turn.spec.request_id)
        await pause

    def _release(self) -> None:
        for turn in self._turns.values():
            turn.go.set()

    # --- results
    def _result(self, spec: SampleSpec, output: Output, began_at: int) -> SampleResult:
        spans = tuple(Span(version=int(v), start=a, stop=b) for v, a, b in output.labels if b > a)
        for position, logprob in enumerate(output.logprobs):
            if not math.isfinite(logprob):
                version = next(s.version for s in spans if s.start <= position < s.stop)
                self._die(f"logits of version {version} are not finite")
                raise EngineDead(self._dead)
        # A prefix that was computed under another version than it began with may be in the cache.
        mixed = self._sync.keep_kv and any(span.version != began_at for span in spans)
        self._counters["mixed_kv_turns"] += mixed
        sampled = SampledTokens(
            token_ids=Array.of(output.token_ids, "i4"),
            logprobs=Array.of(output.logprobs, "f4"),
            spans=spans,
            mixed_kv=mixed,
            routing=records_of(output.routing, spans, len(spec.token_ids), spec.routing_held),
        )
        return SampleResult(sampled, output.finish)

    # --- life and death
    async def _look(self) -> None:
        while not self._dead:
            await asyncio.sleep(WATCH_S)
            if reason := self._server.failure():
                self._die(reason)

    async def _ended_by_death(self, turn: _Turn, output: Awaitable[Output]) -> Output:
        turn.task = asyncio.ensure_future(output)
        try:
            return await self._or_dead(turn.task)
        except EngineDead as error:
            self._die(str(error))
            raise

    async def _within(self, call: Awaitable[T]) -> T:
        """Await a call of the server's, no longer than it lives and than a swap may take."""
        task = asyncio.ensure_future(call)
        self._calls.add(task)
        try:
            async with asyncio.timeout(self._sync.swap_timeout_s):
                return await self._or_dead(task)
        except TimeoutError as error:
            self._die(f"no answer within {self._sync.swap_timeout_s:g} s")
            raise EngineDead(self._dead) from error
        finally:
            self._calls.discard(task)

    async def _or_dead(self, task: asyncio.Future[T]) -> T:
        try:
            return await task
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if self._dead and (current is None or not current.cancelling()):
                raise EngineDead(self._dead) from None
            raise

    def _refuse_if_dead(self) -> None:
        if self._dead:
            raise EngineDead(self._dead)

    def _die(self, reason: str) -> None:
        if self._dead:
            return
        self._dead = reason
        self._version = -1
        self._release()
        for task in [*self._calls, *(t.task for t in self._turns.values() if t.task is not None)]:
            task.cancel()


_NOTHING = SampledTokens(token_ids=Array.of([], "i4"), logprobs=Array.of([], "f4"), spans=())


def _line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
