"""Learner, env agents and torch rollouts around one MemoryServer, each of which can be killed."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from services.env_agents import service as env_agents
from services.env_agents.config import EnvAgentsConfig
from services.learner import service as learner
from services.learner.config import LearnerConfig
from services.logit_oracle import service as logit_oracle
from services.logit_oracle.config import LogitOracleConfig
from services.rollout import service as rollout
from services.rollout.config import RolloutConfig
from shared.algo.batching import pack
from shared.backends.torch_backend import TorchBackend
from shared.runtime.context import Context
from shared.runtime.logs import Log
from shared.runtime.memory_bus import MemoryBus
from shared.runtime.memory_server import MemoryServer
from shared.weights.assembly import make_follower, make_history
from shared.wire.codec import decode, encode
from shared.wire.journal import Batch, JournalEntry, Member
from shared.wire.messages import Score, Terminal
from shared.wire.subjects import Subjects
from shared.wire.telemetry import Role, StepReport
from shared.wire.trajectory import Trajectory

BASE = "examples/frozen_lake/base"
SUBJECTS = Subjects("fence")
CONFIGS = {
    "learner": LearnerConfig,
    "env_agents": EnvAgentsConfig,
    "rollout": RolloutConfig,
    "logit_oracle": LogitOracleConfig,
}
SERVE: dict[str, Callable[..., Awaitable[None]]] = {
    "learner": learner.serve,
    "env_agents": env_agents.serve,
    "rollout": rollout.serve,
    "logit_oracle": logit_oracle.serve,
}


def settings(run_dir: Path, versions: int) -> dict[str, Any]:
    return {
        "run": {"name": "fence", "seed": 5, "dir": str(run_dir)},
        "model": {"source": BASE, "dtype": "float64"},
        "task": {"max_turns": 6},
        "sampling": {"max_new_tokens": 4, "context_tokens": 96},
        "admission": {"groups_per_version": 3, "group_size": 6, "max_staleness": 2},
        "old_logprobs": {"route": "interrupt", "fence_timeout_s": 5.0},
        "telemetry": {"lease_interval_s": 0.1, "lease_expiry_s": 0.6},
        "learner": {
            "versions": versions,
            "optimizer": {"lr": 1e-3, "minibatches": 2},
            "algo": {"corrections": [], "objective": {"kind": "ppo", "low": 0.5, "high": 0.5}},
            "eval": {"episodes": 0},
            "checkpoint": {"every_versions": 2},
        },
        "env_agents": {
            "concurrency": 24, "heartbeat_s": 0.1, "ack_wait_s": 0.6, "pull_timeout_s": 0.05,
            "backoff_s": 0.01, "backoff_max_s": 0.05, "drain_s": 0.5,
        },
        "rollout": {
            "dtype": "float64", "heartbeat_s": 0.05, "max_running": 6, "kv_slots": 16,
            "drain_s": 0.5, "follow_retry_s": 0.05,
        },
    }  # fmt: skip


class Killed(BaseException):
    """Stands for kill -9: nothing in the process runs after it."""


class MortalBus(MemoryBus):
    """A connection that dies with its process; `before` may say when."""

    dead = False
    before: Callable[[str, str], None] | None = None
    """Called with the operation and its subject or key; may raise."""

    def _check(self, operation: str, subject: str) -> None:
        if self.dead:
            raise Killed
        if self.before is not None:
            self.before(operation, subject)

    async def publish(self, subject: str, payload: bytes) -> None:
        self._check("publish", subject)
        await super().publish(subject, payload)

    async def publish_request(self, subject: str, payload: bytes, reply: str) -> None:
        self._check("publish", subject)
        await super().publish_request(subject, payload, reply)

    async def append(self, subject: str, payload: bytes, **options: Any) -> int:
        self._check("append", subject)
        seq = await super().append(subject, payload, **options)
        self._check("appended", subject)
        return seq

    async def put_control(self, key: str, payload: bytes) -> None:
        self._check("put", key)
        await super().put_control(key, payload)
        self._check("was_put", key)

    async def _until_up(self) -> None:
        if self.dead:
            raise Killed
        await super()._until_up()


class Process:
    """One service: its context, its task, its leases."""

    def __init__(self, server: MemoryServer, role: Role, pod: str, config: Any) -> None:
        self.bus = MortalBus(SUBJECTS, server, name=pod)
        self.context = Context(role, pod, uuid.uuid4().hex, self.bus, Log(role, pod))
        self._leases = asyncio.create_task(self._renew(config.telemetry.lease_interval_s))
        self.task = asyncio.create_task(self._serve(SERVE[role], config))

    async def _serve(self, serve: Callable[..., Awaitable[None]], config: Any) -> bool:
        """True when it was killed."""
        killed = False
        try:
            await serve(self.context, config)
        except* Killed:
            killed = True
        return killed

    async def _renew(self, interval_s: float) -> None:
        subject = SUBJECTS.lease(self.context.role, self.context.pod)
        with suppress(Killed):
            while True:
                self.context.lease_due.clear()
                await self.bus.publish(subject, encode(self.context.lease(os.getpid())))
                with suppress(TimeoutError):
                    async with asyncio.timeout(interval_s):
                        await self.context.lease_due.wait()

    async def kill(self) -> None:
        self.bus.dead = True
        self._leases.cancel()
        self.task.cancel()
        await asyncio.gather(self.task, self._leases, return_exceptions=True)
        await self.bus.close()

    async def stop(self) -> None:
        self.context.stop.set()
        with suppress(TimeoutError):
            async with asyncio.timeout(5):
                await asyncio.shield(self.task)
        await self.kill()


class World:
    """All processes of one run."""

    def __init__(self, run_dir: Path, versions: int = 5, **changes: dict[str, Any]) -> None:
        self.server = MemoryServer()
        self.bus = MemoryBus(SUBJECTS, self.server, name="looker")
        self.settings = settings(run_dir, versions)
        for section, values in changes.items():
            self.settings[section] |= values
        self.processes: dict[str, Process] = {}

    def start(self, role: Role, pod: str = "", **changes: dict[str, Any]) -> Process:
        common = {k: v for k, v in self.settings.items() if k not in CONFIGS or k == role}
        common |= {section: common[section] | values for section, values in changes.items()}
        config = CONFIGS[role].model_validate(common)
        pod = pod or f"{role}-0"
        self.processes[pod] = Process(self.server, role, pod, config)
        return self.processes[pod]

    async def restart(self, pod: str) -> Process:
        """Kill -9 and start again under the same name."""
        await self.processes[pod].kill()
        return self.start(self.processes[pod].context.role, pod)

    async def learned(self, timeout_s: float = 60.0) -> bool:
        """Wait for the learner's end; True when it was killed."""
        async with asyncio.timeout(timeout_s):
            return await self.processes["learner-0"].task

    async def close(self) -> None:
        for process in self.processes.values():
            await process.stop()
        await self.bus.close()

    async def __aenter__(self) -> World:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    # --- what happened
    async def records(self, stream: Any) -> list[Any]:
        state = await self.bus.stream_state(stream)
        found = [await self.bus.get(stream, s) for s in range(1, state.last_seq + 1)]
        return [record for record in found if record is not None]

    async def batches(self) -> list[Batch]:
        entries = [decode(r.payload, JournalEntry) for r in await self.records("journal")]
        return [entry.body for entry in entries if isinstance(entry.body, Batch)]

    async def reports(self) -> list[StepReport]:
        return [decode(r.payload, StepReport) for r in await self.records("stats")]

    async def trained(self) -> list[tuple[Batch, Any, Member, Trajectory, Score]]:
        found: list[tuple[Batch, Any, Member, Trajectory, Score]] = []
        for batch in await self.batches():
            for group in batch.groups:
                for member in group.members:
                    terminal = await self.bus.get("terminals", member.terminal_seq)
                    score = await self.bus.get("scores", member.score_seq)
                    assert terminal is not None
                    assert score is not None
                    outcome = decode(terminal.payload, Terminal).outcome
                    assert isinstance(outcome, Trajectory)
                    found.append((batch, group, member, outcome, decode(score.payload, Score)))
        return found

    async def published(self, versions: int) -> dict[int, dict[str, torch.Tensor]]:
        """Every version's tensors, as any follower gets them from the bus."""
        weights = LearnerConfig().weights
        history = make_history(weights, keep_past=True)
        follower = make_follower(weights, self.bus, history, Log("looker"))
        seen = asyncio.Event()

        async def on_head(manifest: Any, _changed: Any) -> None:
            if manifest.version == versions:
                seen.set()

        task = asyncio.create_task(follower.run(on_head, start="oldest_needed"))
        states: dict[int, dict[str, torch.Tensor]] = {}
        try:
            async with asyncio.timeout(20):
                await seen.wait()
                for version in range(versions + 1):
                    await follower.ensure(version, 10.0)
                    async with history.at(version) as state:
                        states[version] = {n: t.clone() for n, t in state.items()}
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        return states


class Reference:
    """A fresh model, one whole sequence per call."""

    def __init__(self, states: dict[int, dict[str, torch.Tensor]]) -> None:
        self._states = states
        self._backend = TorchBackend(torch.float64)
        self._backend.load_hf(Path(BASE))
        self._at = -1

    def moved(self, version: int) -> bool:
        """Whether the step that led to a version changed anything."""
        if version == 0:
            return False
        before, after = self._states[version - 1], self._states[version]
        return any(not torch.equal(before[name], after[name]) for name in after)

    def logprobs(self, token_ids: Any, version: int) -> np.ndarray:
        if self._at != version:
            self._backend.load_state(self._states[version])
            self._at = version
        batch = pack([token_ids], {})
        return self._backend.score(batch, temperature=1.0).numpy()
