"""A server that samples without a model: random order of events, labels as vLLM attaches them.

Every token is `label + position`, its log-prob the label that it was sampled under, so that a wrong
stamp shows in the answer itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random

import torch

from services.rollout.engine import EngineDead, EngineLoad, SampleSpec
from services.rollout.vllm_port import Output, PauseMode
from shared.weights.digests import spec as spec_of
from shared.wire.weights import TensorSpec


@dataclass(eq=False)
class Running:
    spec: SampleSpec
    salt: str
    tokens: list[int] = field(default_factory=list[int])
    logprobs: list[float] = field(default_factory=list[float])
    labels: list[tuple[str, int, int]] = field(default_factory=list[tuple[str, int, int]])
    kv: set[str] = field(default_factory=set[str])
    """Labels under which its keys and values were computed."""
    done: asyncio.Event = field(default_factory=asyncio.Event)
    finish: str = ""


class SimulatedServer:
    def __init__(self, seed: int, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.shapes = shapes
        self.vocab_size = 29
        self.random = Random(seed)
        self.label = "default"
        self.paused = False
        self.draining = False
        self.swapping = False
        self.dead = ""
        self.die_in: str = ""
        """The call in which it dies."""
        self.hang_in: str = ""
        self.nan_under: str = ""
        self.held = False
        """Nobody gets a token."""
        self.limit = 1 << 40
        """Nobody gets more of them."""
        self.swap_s = 0.0
        self.queued = 0
        self.running: dict[str, Running] = {}
        self.answers: list[Running] = []
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        await self._call("start")
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def _call(self, name: str) -> None:
        for _ in range(self.random.randrange(3)):
            await asyncio.sleep(0)
        if self.hang_in == name:
            await asyncio.Event().wait()
        if self.die_in == name:
            self.dead = f"killed in {name}"
        if self.dead:
            raise RuntimeError(self.dead)

    async def _run(self) -> None:
        while not self.dead:
            await asyncio.sleep(0)
            if self.paused or self.held:
                continue
            assert not self.swapping
            for running in list(self.running.values()):
                if len(running.tokens) < self.limit and self.random.random() < 0.7:
                    self._step(running)

    def _step(self, running: Running) -> None:
        at = len(running.tokens)
        running.kv.add(self.label)
        running.tokens.append(at % self.vocab_size)
        bad = self.nan_under == self.label
        running.logprobs.append(float("nan") if bad else -float(self.label))
        if running.labels and running.labels[-1][0] == self.label:
            running.labels[-1] = (self.label, running.labels[-1][1], at + 1)
        else:
            running.labels.append((self.label, at, at + 1))
        if at + 1 == running.spec.max_new_tokens:
            self._end(running, "length")

    def _end(self, running: Running, finish: str) -> None:
        self.running.pop(running.spec.request_id, None)
        running.finish = finish
        running.done.set()

    async def write(
        self, state: Mapping[str, torch.Tensor], names: Iterable[str]
    ) -> list[TensorSpec]:
        await self._call("write")
        return [spec_of(name, state[name]) for name in names]

    async def swap(self, names: Sequence[str], label: str) -> None:
        assert self.paused
        self.swapping = True
        await self._call("swap")
        await asyncio.sleep(self.swap_s)
        self.swapping = False
        self.label = label

    async def pause(self, mode: PauseMode, *, clear_cache: bool) -> None:
        await self._call("pause")
        if mode == "abort":
            for running in list(self.running.values()):
                self._end(running, "interrupted")
        if mode == "wait":
            while self.running:  # noqa: ASYNC110
                await asyncio.sleep(0)
        self.paused = True
        if clear_cache:
            for running in self.running.values():
                running.kv.clear()

    async def resume(self) -> None:
        await self._call("resume")
        self.paused = False

    async def generate(self, spec: SampleSpec, salt: str) -> Output:
        if self.dead:
            raise EngineDead(self.dead)
        running = self.running[spec.request_id] = Running(spec, salt)
        try:
            await running.done.wait()
        finally:
            self.running.pop(spec.request_id, None)
        self.answers.append(running)
        return Output(running.tokens, running.logprobs, running.labels, running.finish)  # type: ignore[arg-type]

    async def score(self, token_ids: Sequence[int]) -> list[float]:
        await self._call("score")
        return [0.0] + [-float(self.label)] * (len(token_ids) - 1)

    def abort(self, request_id: str) -> None:
        running = self.running.get(request_id)
        if running is not None:
            self._end(running, "interrupted")

    def num_sampled(self, request_id: str) -> int:
        running = self.running.get(request_id)
        return 0 if running is None else len(running.tokens)

    def load(self) -> EngineLoad:
        return EngineLoad(len(self.running), self.queued, 0.0)

    def failure(self) -> str:
        return self.dead

    async def close(self) -> None:
        self.dead = self.dead or "closed"
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
