"""A rollout on a MemoryBus, a learner's publications for it, and a caller that keeps replies."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from services.rollout.config import RolloutConfig
from services.rollout.engine import Engine
from services.rollout.engine_host import EngineHost
from services.rollout.service import Rollout, make_engine, serve
from services.rollout.torch_engine import DTYPES
from shared.runtime.bus import CoreMessage
from shared.runtime.context import Context
from shared.runtime.logs import Log
from shared.runtime.memory_bus import MemoryBus
from shared.runtime.memory_server import MemoryServer
from shared.weights.canary import canary_tokens, make_canary
from shared.weights.publisher import Publisher
from shared.wire.base import Array
from shared.wire.codec import decode, encode
from shared.wire.messages import CancelRequest, SampleReply, SampleRequest
from shared.wire.subjects import Subjects
from shared.wire.trajectory import SamplingParams
from tests.rollout.models import VOCAB, State, make_state, reference_logprobs

SUBJECTS = Subjects("test")
FINAL = ("behind", "partial", "done", "refused")


def make_config(model_dir: Path, **rollout: object) -> RolloutConfig:
    section: dict[str, object] = {
        "dtype": "float32",
        "heartbeat_s": 0.05,
        "behind_wait_s": 0.05,
        "drain_s": 2.0,
        "follow_retry_s": 0.05,
        "max_running": 8,
        "kv_slots": 16,
        **rollout,
    }
    return RolloutConfig.model_validate(
        {
            "model": {"source": str(model_dir)},
            "sampling": {"context_tokens": 96},
            "rollout": section,
        }
    )


class World:
    """One memory server with a learner publishing on it and a caller asking for tokens."""

    def __init__(
        self,
        model_dir: Path,
        *,
        per_token: float | None = None,
        reference: Callable[[State, list[int]], Sequence[float]] | None = None,
    ) -> None:
        """Publish for `model_dir`.

        Args:
            model_dir: the model.
            per_token: the canary of version v is v times that.
            reference: log-probs of token ids, of a model that is not the dense one.
        """
        self.model_dir = model_dir
        self._reference = reference
        self._per_token = per_token
        self._num_published = 0
        self.server = MemoryServer()
        self.bus = MemoryBus(SUBJECTS, self.server, name="caller")
        self._publisher: Publisher | None = None
        self.replies: dict[str, list[SampleReply]] = {}
        self.unheard = 0
        """Requests for which the bus said that nobody listens."""
        self._arrived = asyncio.Condition()

    async def publish(self, state: State, *, canary_of: State | None = None) -> int:
        """Publish a state as the next version and return it; its canary is that of its own bytes.

        `canary_of`: of these instead, as if the version had been mistaken for another.
        """
        if self._publisher is None:
            await self.bus.create_streams()
            self._publisher = Publisher(
                self.bus, model_id="policy", producer="test", log=Log("test"), keyframe_every=4
            )
            await self._publisher.start()
        scored = state if canary_of is None else canary_of
        tied = "lm_head.weight" not in scored

        def score(ids: list[np.ndarray]) -> list[np.ndarray]:
            if self._reference is not None:
                return [np.array(self._reference(scored, i.tolist())) for i in ids]
            if self._per_token is None:
                return [np.array(reference_logprobs(scored, i.tolist(), tied=tied)) for i in ids]
            each = self._per_token * self._num_published
            return [np.array([0.0] + [each] * (len(i) - 1)) for i in ids]

        canary = make_canary(score, canary_tokens(VOCAB, 16, 0), torch.float32)
        self._num_published += 1
        published = await self._publisher.publish(state, epoch=0, optimizer_steps=0, canary=canary)
        return published.manifest.version

    async def publish_seed(self, seed: int) -> int:
        return await self.publish(make_state(seed, tied=False, dtype=torch.float32))

    def context(self, pod: str = "pod-a") -> Context:
        bus = MemoryBus(SUBJECTS, self.server, name=pod)
        return Context("rollout", pod, "i", bus, Log("rollout", pod))

    @asynccontextmanager
    async def pod(
        self,
        name: str = "pod-a",
        *,
        make: Callable[[RolloutConfig], Engine] = make_engine,
        wait: bool = True,
        **rollout: object,
    ) -> AsyncIterator[Context]:
        """A rollout for the length of the block, then stopped as on SIGTERM."""
        context, config = self.context(name), make_config(self.model_dir, **rollout)

        async def run() -> None:
            if make is make_engine:
                await serve(context, config)
                return
            dtype = DTYPES[config.rollout.dtype]
            host = EngineHost(lambda: make(config), dtype, context.log)
            await host.start()
            await Rollout(context, config, host).run()
            await host.close()

        async with asyncio.TaskGroup() as group:
            task = group.create_task(run())
            if wait:
                await eventually(lambda: context.health.ready)
            yield context
            context.stop.set()
            async with asyncio.timeout(5):
                await task
        await context.bus.close()

    # --- the caller
    async def ask(self, request: SampleRequest, pod: str | None = None) -> None:
        """Send a request; its replies are kept by request id."""
        inbox = self.bus.new_inbox()
        await self.bus.open_inbox(inbox, self._keep)
        subject = SUBJECTS.sample_pod(pod) if pod else SUBJECTS.sample("policy")
        await self.bus.publish_request(subject, encode(request), inbox)

    async def cancel(self, request_id: str, pod: str = "pod-a") -> None:
        message = encode(CancelRequest(request_id=request_id))
        await self.bus.publish(SUBJECTS.cancel(pod), message)

    async def final(self, request_id: str, timeout_s: float = 5.0) -> Any:
        """The body of the final reply."""

        def answered() -> bool:
            return any(r.body.kind in FINAL for r in self.replies.get(request_id, ()))

        async with asyncio.timeout(timeout_s), self._arrived:
            await self._arrived.wait_for(answered)
        return self.replies[request_id][-1].body

    async def answer(self, request: SampleRequest, pod: str | None = None) -> Any:
        await self.ask(request, pod)
        return await self.final(request.request_id)

    def kinds(self, request_id: str) -> list[str]:
        return [reply.body.kind for reply in self.replies.get(request_id, ())]

    def said(self, request_id: str) -> list[str]:
        """Kinds of the replies, heartbeats left out."""
        return [kind for kind in self.kinds(request_id) if kind != "heartbeat"]

    async def _keep(self, message: CoreMessage) -> None:
        if not message.payload:
            self.unheard += 1
            return
        reply = decode(message.payload, SampleReply)
        async with self._arrived:
            self.replies.setdefault(reply.request_id, []).append(reply)
            self._arrived.notify_all()


def make_request(
    request_id: str = "r", token_ids: Iterable[int] = (1, 2, 3), new: int = 5, **changes: Any
) -> SampleRequest:
    fields: dict[str, Any] = {
        "sampling": SamplingParams(max_new_tokens=new),
        "min_version": 0,
        "seed": 3,
        "expires": time.time() + 30,
    } | changes
    return SampleRequest(
        request_id=request_id,
        ticket_id="t",
        token_ids=Array.of(list(token_ids), "i4"),
        max_new_tokens=new,
        **fields,
    )


async def eventually(condition: Callable[[], object], timeout_s: float = 5.0) -> None:
    for _ in range(int(timeout_s / 0.005)):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise TimeoutError(f"not within {timeout_s:g} s")
