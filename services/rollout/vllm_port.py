"""What `VllmEngine` asks of vLLM: `VllmServer` gives it, tests simulate it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy.typing as npt
import torch

from services.rollout.engine import EngineLoad, SampleSpec
from shared.wire.weights import TensorSpec

Mode = Literal["keep", "interrupt", "wait"]
PauseMode = Literal["keep", "abort", "wait"]


@dataclass(frozen=True, slots=True, eq=False)
class Recorded:
    """Experts of tokens [start, start + T) of prefix and answer, computed under one version."""

    label: str
    start: int
    experts: npt.NDArray[Any]
    """u1 or u2 [T, L, K]."""


@dataclass(frozen=True, slots=True)
class Output:
    """What the server made of one request."""

    token_ids: Sequence[int]
    logprobs: Sequence[float]
    labels: Sequence[tuple[str, int, int]]
    """(version label, start, stop), tiling the tokens."""
    finish: Literal["stop", "length", "interrupted"]
    routing: Sequence[Recorded] = ()
    """In the order of computation, and more than the answer needs."""


@dataclass(frozen=True, slots=True)
class Sync:
    """How versions are changed while turns run."""

    mode: Mode = "keep"
    keep_kv: bool = False
    """keep: go on over keys and values of older weights; such turns are marked `mixed_kv`."""
    wait_s: float = 30.0
    """wait: after so long, what still runs is interrupted."""
    swap_timeout_s: float = 120.0
    """A swap that takes longer counts as the engine's death."""


class Server(Protocol):
    """The engine proper. `failure` and the counters may be read at any time."""

    shapes: Mapping[str, tuple[int, ...]]
    """Of the published tensors."""
    vocab_size: int

    async def start(self) -> None: ...

    async def write(
        self, state: Mapping[str, torch.Tensor], names: Iterable[str]
    ) -> list[TensorSpec]:
        """Put tensors where the next `swap` finds them; return what they are in its dtype."""
        ...

    async def swap(self, names: Sequence[str], label: str) -> None:
        """Load what was written of `names`; only while paused. Later tokens carry `label`."""
        ...

    async def pause(self, mode: PauseMode, *, clear_cache: bool) -> None: ...

    async def resume(self) -> None: ...

    async def generate(self, spec: SampleSpec, salt: str) -> Output: ...

    async def score(self, token_ids: Sequence[int]) -> list[float]: ...

    def abort(self, request_id: str) -> None:
        """End a request that `generate` was called for, with what it has."""
        ...

    def num_sampled(self, request_id: str) -> int: ...

    def load(self) -> EngineLoad: ...

    def failure(self) -> str:
        """Why it is dead; empty while it lives."""
        ...

    async def close(self) -> None: ...
