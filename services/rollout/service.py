"""The shell: requests in, replies out (`requests.py`), weights followed.

Follower: consumes manifests and chunks; waits for new versions; produces swaps. Keeper: every
heartbeat, produces heartbeats, gauges and counters. Healer: waits for the engine's death; produces
a new engine under the same version.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from services.rollout.config import RolloutConfig
from services.rollout.engine import Engine, EngineDead
from services.rollout.engine_host import EngineHost
from services.rollout.intake import Limits
from services.rollout.requests import Requests
from services.rollout.routing_size import warn_of_refusals
from services.rollout.torch_engine import DTYPES, TorchEngine
from shared.runtime.bus import CoreMessage, Subscription
from shared.runtime.context import Context
from shared.runtime.errors import ConfigError, Fatal
from shared.runtime.intake import accept
from shared.weights.assembly import make_follower, make_history
from shared.weights.errors import MissingVersion
from shared.wire.errors import ForeignMajor
from shared.wire.messages import CancelRequest, SampleRequest
from shared.wire.weights import Manifest

QUEUE = "rollout"
"""Queue group: a request to the model goes to one of its pods."""

FOREIGN_S = 10.0
"""How long a message of another wire major keeps the pod unready."""

M = TypeVar("M", SampleRequest, CancelRequest)


async def serve(context: Context, config: RolloutConfig) -> None:
    """Sample until the context is stopped.

    Raises:
        ConfigError: the model directory or the context length cannot be used.
        BusUnavailable: the bus did not answer within its bounds.
        Fatal: the engine cannot be started, or the published weights do not fit the model.
    """
    section = config.rollout
    try:
        host = EngineHost(lambda: make_engine(config), DTYPES[section.dtype], context.log)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    context.health.set_unready(host.problem)
    if not await context.streams_exist(section.streams_timeout_s):
        return
    try:
        if not await _started(context, host):
            return
        context.log.info("serving", engine=section.engine, dtype=section.dtype)
        warn_of_refusals(context, config)
        if section.engine == "vllm":
            from services.rollout.vllm_metrics import VllmCollector

            context.registry.register(VllmCollector())
        await Rollout(context, config, host).run()
    finally:
        await host.close()


async def _started(context: Context, host: EngineHost) -> bool:
    """Start the engine; False: the stop signal came first."""
    start = asyncio.ensure_future(host.start())
    stop = asyncio.ensure_future(context.stop.wait())
    await asyncio.wait((start, stop), return_when=asyncio.FIRST_COMPLETED)
    stop.cancel()
    if not start.done():
        start.cancel()
        await asyncio.gather(start, return_exceptions=True)
        return False
    try:
        start.result()
    except EngineDead as error:
        raise Fatal(str(error)) from error
    return True


def make_engine(config: RolloutConfig) -> Engine:
    """Build the configured engine.

    Raises:
        ValueError: the model directory or the context length cannot be used.
    """
    section = config.rollout
    if section.engine == "vllm":
        return _make_vllm(config)
    return TorchEngine(
        Path(config.model.source),
        dtype=section.dtype,
        context_tokens=config.sampling.context_tokens,
        max_running=section.max_running,
        kv_slots=section.kv_slots,
        step_tokens=section.step_tokens,
        record_routing=config.model.routing == "replay",
    )


def _make_vllm(config: RolloutConfig) -> Engine:
    from services.rollout.vllm_server import make_vllm_engine

    section = config.rollout
    try:
        return make_vllm_engine(
            Path(config.model.source),
            section,
            context_tokens=config.sampling.context_tokens,
            record_routing=config.model.routing == "replay",
        )
    except ImportError as error:
        raise ValueError(
            f"rollout.engine vllm: {error}; run it in the environment that `make install-vllm` "
            "makes, or take rollout.engine: torch"
        ) from error


class Rollout:
    """The service around an engine host; tests hand it one of their own."""

    def __init__(self, context: Context, config: RolloutConfig, host: EngineHost) -> None:
        section = config.rollout
        self._context = context
        self._section = section
        self._model_id = config.model.model_id
        self._host = host
        self._group = asyncio.TaskGroup()
        self._requests = Requests(
            context,
            host,
            self._group,
            model_id=config.model.model_id,
            max_concurrency=section.max_concurrency,
            behind_wait_s=section.behind_wait_s,
            limits=Limits(section.max_waiting, section.max_kv_used_ratio),
        )
        self._history = make_history(config.weights, keep_past=False)
        self._follower = make_follower(
            config.weights,
            context.bus,
            self._history,
            context.log,
            chunk_timeout_s=section.chunk_timeout_s,
            retry_s=section.follow_retry_s,
        )
        self._subscriptions: list[Subscription] = []
        """The queue group's first."""
        self._group_subject = context.bus.subjects.sample(config.model.model_id)
        self._draining = False
        self._foreign_until = 0.0
        self._started_s = time.thread_time()

    async def run(self) -> None:
        """Serve until the context is stopped, then send what is running as partial turns."""
        async with self._group as group:
            background = [
                group.create_task(self._follower.run(self._show)),
                group.create_task(self._keep()),
                group.create_task(self._heal()),
            ]
            await self._context.stop.wait()
            await self._drain()
            for task in background:
                task.cancel()

    # --- weights
    async def _show(self, manifest: Manifest, changed: frozenset[str] | None) -> None:
        """Swap to the newest version, at a token boundary."""
        try:
            async with self._history.at(manifest.version) as state:
                await self._host.show(manifest, state, changed)
        except ValueError as error:
            raise Fatal(
                f"version {manifest.version} does not fit the model: {error}; is model.source the "
                "learner's?"
            ) from error
        if self._host.problem:
            self._requests.engine_died.set()
        else:
            self._context.count("sync_lag_s", max(0.0, time.time() - manifest.published_at))
            self._context.log.info("swapped", version=manifest.version)
        self._look()
        if not self._subscriptions and not self._draining:
            await self._subscribe()

    async def _subscribe(self) -> None:
        """Take requests; not before there are weights, or the queue group would hand us some."""
        bus = self._context.bus
        take, cancel = self._on_request, self._on_cancel
        self._subscriptions = [
            await bus.subscribe(bus.subjects.sample(self._model_id), take, queue=QUEUE),
            await bus.subscribe(bus.subjects.sample_pod(self._context.pod), take),
            await bus.subscribe(bus.subjects.cancel(self._context.pod), cancel),
        ]

    async def _heal(self) -> None:
        while True:
            await self._requests.engine_died.wait()
            self._requests.engine_died.clear()
            self._look()
            await self._revive()
            self._look()

    async def _revive(self) -> None:
        while (newest := self._history.newest) >= 0:
            try:
                async with self._history.at(newest) as state:
                    await self._host.revive(self._history.manifest(newest), state)
            except MissingVersion:
                continue  # a newer version came while this one was waited for
            return

    def _look(self) -> None:
        """Bring version, readiness and whoever waits for a version up to date."""
        self._requests.look_again()
        if self._context.version != self._host.version:
            self._context.set_version(self._host.version)
        problem = self._unable()
        if problem:
            self._context.health.set_unready(problem)
        else:
            self._context.health.set_ready()

    def _unable(self) -> str:
        """Why this pod should get no requests now, or nothing."""
        if self._draining:
            return "draining"
        if self._host.problem:
            return self._host.problem
        if self._follower.refused:
            return f"manifest unreadable: {next(iter(self._follower.refused.values()))}"
        if time.monotonic() < self._foreign_until:
            return "a peer speaks another wire version: finish the rolling upgrade"
        return ""

    # --- messages
    async def _on_request(self, message: CoreMessage) -> None:
        request = await self._decoded(message, SampleRequest)
        if request is not None:
            if message.subject != self._group_subject:
                self._context.count("affine_requests")
            await self._requests.take(request, message.reply)

    async def _on_cancel(self, message: CoreMessage) -> None:
        cancel = await self._decoded(message, CancelRequest)
        if cancel is not None:
            self._requests.cancel(cancel.request_id)

    async def _decoded(self, message: CoreMessage, kind: type[M]) -> M | None:
        try:
            return await accept(self._context, message.subject, 0, message.payload, kind)
        except ForeignMajor as error:
            # Nobody stores it: its sender hears nothing and asks an upgraded pod.
            self._foreign_until = time.monotonic() + FOREIGN_S
            self._context.log.warning("foreign_major", reason=str(error))
            self._look()
            return None

    # --- every heartbeat
    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(self._section.heartbeat_s)
            if self._host.look():
                self._requests.engine_died.set()
            await self._requests.heartbeat()
            self._measure()
            self._look()

    def _measure(self) -> None:
        context, load = self._context, self._host.engine.load()
        counters = self._host.counters()
        # The engine computes on the loop's thread; one that does not reports its own time.
        own_s = time.thread_time() - self._started_s
        context.busy_s = max(own_s, counters.pop("busy_s", 0.0))
        context.counters.update(counters)
        context.gauges["prefix_hit_ratio"] = _share(
            counters.get("prefix_hit_tokens", 0.0), counters.get("prefill_tokens", 0.0)
        )
        asked = context.counters.get("requests", 0.0)
        affine = context.counters.get("affine_requests", 0.0)
        context.gauges["affine_requests_ratio"] = _share(affine, asked - affine)
        context.counters["weight_bytes"] = float(self._follower.bytes_fetched)
        context.counters["weight_resyncs"] = float(self._follower.resyncs)
        context.counters["weight_faults"] = float(self._history.faults)
        context.gauges["keyframe_wanted"] = float(self._follower.keyframe_wanted)
        context.gauges.update(
            running=float(load.running),
            waiting=float(load.waiting),
            kv_used_ratio=load.kv_used_ratio,
            open_requests=float(len(self._requests)),
        )

    # --- the end
    async def _drain(self) -> None:
        """Take nothing further; send what was sampled so far; bounded by `drain_s`."""
        self._draining = True
        self._look()
        with suppress(TimeoutError):
            async with asyncio.timeout(self._section.drain_s):
                for subscription in self._subscriptions[:1]:
                    await subscription.close()
                await self._requests.drain()
                for subscription in self._subscriptions[1:]:
                    await subscription.close()
        self._requests.abandon()
        self._measure()


def _share(part: float, rest: float) -> float:
    """Return `part` of both together, 0 of nothing."""
    return part / (part + rest) if part + rest > 0 else 0.0
