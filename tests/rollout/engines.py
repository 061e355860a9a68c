"""Engines under contract, by name: an engine joins the suite by joining `ENGINES`."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from services.rollout.engine import Engine, SampleResult, SampleSpec
from services.rollout.torch_engine import TorchEngine
from shared.wire.trajectory import SamplingParams
from tests.rollout.models import TOLERANCE, State, make_state, reference_logprobs

CONTEXT = 96

VLLM = os.environ.get("LAGWISE_TEST_ENGINES") == "vllm"
"""`make test-vllm`: the same suite on real vLLM engines, which its own environment has."""


@dataclass(frozen=True)
class EngineKind:
    make: Callable[..., Engine]
    dtype: torch.dtype
    reuse_tokens: int = 1
    """A prefix is reused in multiples of it."""
    tick_s: float = 0.0
    """About what a step takes, for disturbing turns while they run; 0: a turn of the loop."""

    @property
    def tolerance(self) -> float:
        return TOLERANCE[self.dtype]


def _torch(dtype: str) -> Callable[..., TorchEngine]:
    def make(model_dir: Path, **options: Any) -> TorchEngine:
        defaults: dict[str, Any] = {"context_tokens": CONTEXT, "max_running": 8, "kv_slots": 16}
        return TorchEngine(model_dir, dtype=dtype, **defaults | options)  # type: ignore[arg-type]

    return make


def _engines() -> dict[str, EngineKind]:
    if VLLM:
        from tests.rollout.vllm.pool import Borrowed

        def make(model_dir: Path, **_: Any) -> Any:
            return Borrowed(model_dir, "float32")

        kind = EngineKind(make, torch.float32, reuse_tokens=32, tick_s=0.0015)
        return {"vllm-float32": kind}
    return {
        "torch-float32": EngineKind(_torch("float32"), torch.float32),
        "torch-float64": EngineKind(_torch("float64"), torch.float64),
    }


ENGINES = _engines()


@asynccontextmanager
async def started(engine: Engine) -> AsyncIterator[Engine]:
    await engine.start()
    try:
        async with asyncio.timeout(100.0 if VLLM else 30.0):
            yield engine
    finally:
        await engine.close()


def make_prompt(seed: int, length: int) -> tuple[int, ...]:
    return tuple(int(i) for i in np.random.default_rng(seed).integers(0, 29, length))


def make_spec(request_id: str, prompt: Iterable[int], new: int = 6, **changes: Any) -> SampleSpec:
    fields: dict[str, Any] = {"seed": 7, "seed_offset": 0} | changes
    sampling = fields.pop("sampling", None) or SamplingParams(
        temperature=fields.pop("temperature", 1.0),
        max_new_tokens=new,
        stop_ids=fields.pop("stop_ids", ()),
    )
    return SampleSpec(
        request_id=request_id,
        token_ids=tuple(prompt),
        sampling=sampling,
        max_new_tokens=new,
        **fields,
    )


def ids_of(result: SampleResult) -> list[int]:
    return result.sampled.token_ids.numpy().tolist()


def stamps_of(result: SampleResult) -> list[int]:
    return [s.version for s in result.sampled.spans for _ in range(s.start, s.stop)]


class Versions:
    """Published states by version, and what the reference says about a sampled answer."""

    def __init__(self, *, tied: bool, dtype: torch.dtype) -> None:
        self.tied = tied
        self.dtype = dtype
        self.states: dict[int, State] = {}

    def __getitem__(self, version: int) -> State:
        if version not in self.states:
            self.states[version] = make_state(version, tied=self.tied, dtype=self.dtype)
        return self.states[version]

    def expected(self, spec: SampleSpec, result: SampleResult, version: int) -> np.ndarray:
        """The reference's log-probs of the answer, all of it under one version."""
        ids = [*spec.token_ids, *ids_of(result)]
        temperature = spec.sampling.temperature
        logprobs = reference_logprobs(self[version], ids, tied=self.tied, temperature=temperature)
        return np.array(logprobs[len(spec.token_ids) :])

    def error(self, spec: SampleSpec, result: SampleResult) -> float:
        """Largest difference between reported log-probs and those under the stamped versions."""
        reported = result.sampled.logprobs.numpy().astype(np.float64)
        stamps = np.array(stamps_of(result))
        worst = 0.0
        for version in set(stamps.tolist()):
            mine = stamps == version
            expected = self.expected(spec, result, version)
            worst = max(worst, float(np.abs(reported - expected)[mine].max()))
        return worst


@contextmanager
def stepwise(engine: Engine) -> Iterator[None]:
    """Hold every turn inside, at its start and then where `when_sampled` has brought it.

    An engine whose steps are turns of this event loop stands still by itself.
    """
    hold = getattr(engine, "hold_at", None)
    if hold is None:
        yield
        return
    hold(0)
    try:
        yield
    finally:
        hold(None)


async def when_sampled(engine: Engine, request_id: str, count: int) -> None:
    """Return at the token boundary after `count` tokens of a running request."""
    hold = getattr(engine, "hold_at", None)
    if hold is not None:
        hold(count)
    while engine.num_sampled(request_id) < count:  # noqa: ASYNC110 - the boundary, not a time
        await asyncio.sleep(0.001 if hold else 0)
