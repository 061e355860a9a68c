"""The backend and the version it holds."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from shared.backends.base import Backend
from shared.backends.trajectory_scoring import LayoutKind, Piece, score_pieces
from shared.runtime.errors import Fatal
from shared.weights.canary import CanaryResult, backend_scorer, check_canary
from shared.weights.history import State, WeightHistory
from shared.wire.messages import Layout
from shared.wire.weights import Manifest

R = TypeVar("R")

INLINE_FLOP = 4e9
"""Packs up to this size take some tens of milliseconds: run inline they cost a tenth less CPU than
in a thread that competes for the interpreter lock. Larger ones would silence the event loop."""


@dataclass(frozen=True, slots=True)
class Forwarded:
    """Result of one pack."""

    values: list[npt.NDArray[np.floating[Any]]]
    """Per piece the log-probs at its positions."""
    seconds: float


class Bench:
    """Materialises versions into a backend and scores under the one it holds.

    Small forwards run inline, large ones in one thread of their own.
    """

    def __init__(
        self, backend: Backend, history: WeightHistory, kind: LayoutKind, *, pack_tokens: int
    ) -> None:
        self._backend = backend
        self._history = history
        self._kind: LayoutKind = kind
        num_parameters = sum(tensor.numel() for tensor in backend.state().values())
        self._inline = 2.0 * num_parameters * pack_tokens <= INLINE_FLOP
        num_threads = torch.get_num_threads()
        # Torch's thread count belongs to the thread that sets it.
        self._executor = ThreadPoolExecutor(
            1, "forward", initializer=torch.set_num_threads, initargs=(num_threads,)
        )
        self.layout = Layout(
            backend=backend.name,
            dtype=str(backend.dtype).removeprefix("torch."),
            kind=kind,
            num_threads=num_threads,
        )
        self.dtype = backend.dtype
        self.digest = ""
        """Of the version held."""
        self.busy_s = 0.0

    async def move(self, version: int) -> CanaryResult:
        """Materialise a version and score its canary.

        Raises:
            MissingVersion: the history does not hold it.
            Fatal: the published tensors do not fit the model.
        """
        async with self._history.at(version) as state:
            manifest = self._history.manifest(version)
            self.digest = ""
            result, _ = await self._run(lambda: self._load(manifest, state))
            self.digest = manifest.digest
        return result

    async def score(self, pieces: Sequence[Piece]) -> Forwarded:
        """Forward one pack under the version held."""
        values, seconds = await self._run(lambda: score_pieces(self._backend, pieces, self._kind))
        return Forwarded(values, seconds)

    def close(self) -> None:
        """Wait for the forward in progress and end the thread."""
        self._executor.shutdown(cancel_futures=True)

    def _load(self, manifest: Manifest, state: State) -> CanaryResult:
        try:
            self._backend.load_state(state)
        except ValueError as error:
            raise Fatal(
                f"version {manifest.version} does not fit the model of model.source: {error}"
            ) from error
        return check_canary(manifest.canary, backend_scorer(self._backend))

    async def _run(self, work: Callable[[], R]) -> tuple[R, float]:
        """Return what `work` returns, and its seconds."""

        def timed() -> tuple[R, float]:
            started = time.perf_counter()
            return work(), time.perf_counter() - started

        if self._inline:
            result, seconds = timed()
            await asyncio.sleep(0)
        else:
            loop = asyncio.get_running_loop()
            result, seconds = await loop.run_in_executor(self._executor, timed)
        self.busy_s += seconds
        return result, seconds
