"""What a rollout asks of an inference engine: `torch_engine.py` or `vllm_engine.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import numpy.typing as npt
import torch

from shared.wire.messages import SampledTokens
from shared.wire.trajectory import SamplingParams


@dataclass(frozen=True, slots=True)
class SampleSpec:
    """One turn to sample."""

    request_id: str
    token_ids: tuple[int, ...]
    """The whole prefix."""
    sampling: SamplingParams
    max_new_tokens: int
    seed: int
    seed_offset: int = 0
    routing_held: tuple[int, int] | None = None
    """(version, stop): rows of routing [0, stop) that the caller has."""


@dataclass(frozen=True, slots=True)
class SampleResult:
    """Tokens, log-probs and exact stamps of one (partial) turn."""

    sampled: SampledTokens
    """Log-probs are f4, or f8 from a float64 engine: the service narrows them for the wire."""
    finish: Literal["stop", "length", "interrupted"]


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """A snapshot for admission and metrics."""

    running: int
    waiting: int
    kv_used_ratio: float
    counters: dict[str, float] = field(default_factory=dict[str, float])
    """Monotonic: sampled_tokens, prefill_tokens, prefix_hit_tokens, swaps, swap_s, busy_s."""


class Engine(Protocol):
    """Token ids in, stamped tokens out.

    Every sampled token is stamped with the version whose weights *and* KV cache produced it:
    an update happens at a token boundary and re-prefills the prefix of what is running.
    """

    context_tokens: int

    @property
    def version(self) -> int:
        """Version in use; -1 before the first update. Void (-1) while one is being written."""
        ...

    @property
    def failure(self) -> str:
        """Why it can never sample again; empty while it can."""
        ...

    async def start(self) -> None:
        """Start it.

        Raises:
            EngineDead: it cannot be started.
        """
        ...

    async def sample(self, spec: SampleSpec) -> SampleResult:
        """Sample one turn with continuous batching.

        Raises:
            ValueError: the prefix and its answer do not fit the context, unknown token ids, or
                sampling parameters the engine cannot honour.
            EngineDead: the engine cannot sample any more.
        """
        ...

    async def update(
        self, version: int, state: Mapping[str, torch.Tensor], changed: Set[str] | None
    ) -> None:
        """Swap to `version` at a token boundary; `changed` names tensors that differ, None = all.

        Raises:
            ValueError: names, shapes or dtypes disagree with the model; the old weights stay.
            EngineDead: the swap failed half-way.
        """
        ...

    def device_digest(self) -> str:
        """Digest of the cast device copy, to hold against the same cast of the source."""
        ...

    def interrupt(self, request_id: str | None = None) -> None:
        """End one running request (None: all) at the next token boundary, as `interrupted`."""
        ...

    def num_sampled(self, request_id: str) -> int:
        """Tokens a running request has so far, for heartbeats."""
        ...

    def load(self) -> EngineLoad: ...

    async def close(self) -> None:
        """End it; whoever still waits gets `EngineDead`. A second call does nothing."""
        ...


@runtime_checkable
class ScoringEngine(Protocol):
    """An engine that can also say what its weights make of given text: optional.

    The host asks such an engine for the canary of every version, where its dtype allows.
    """

    async def score(self, token_ids: Sequence[npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
        """Return the log-probs, at temperature 1, of sequences under the version in use.

        Per sequence [L] an array [L], its first element 0. What is being sampled goes on as if
        this had not been called.

        Raises:
            EngineDead: the engine cannot forward any more.
        """
        ...


class EngineDead(Exception):
    """The engine is gone: the pod goes unready and restarts it."""
