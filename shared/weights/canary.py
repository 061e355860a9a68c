"""The canary: a fixed batch that every follower must score as the publisher did.

Shapes: B sequences of L tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from shared.algo.batching import pack
from shared.wire.base import Array
from shared.wire.weights import Canary

if TYPE_CHECKING:  # rollouts score canaries without a training backend
    from shared.backends.base import Backend

Score = Callable[[Sequence[npt.NDArray[Any]]], list[npt.NDArray[Any]]]
"""Token ids (B arrays [L]) -> log-probs (B arrays [L], position t that of token t; 0 first)."""

NUM_SEQUENCES = 4
MAX_LENGTH = 16

TOLERANCE: dict[torch.dtype, float] = {
    torch.float64: 1e-10,
    torch.float32: 5e-5,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}
"""How far two layouts of the same forward may differ, per published dtype."""


@dataclass(frozen=True, slots=True)
class CanaryResult:
    """How a materialised version scores the canary."""

    max_error: float
    """Largest absolute difference; infinite when anything is not finite."""
    ok: bool


def canary_tokens(vocab_size: int, context: int, seed: int) -> npt.NDArray[np.int32]:
    """Return the fixed batch i4[B, L] of a run: B = 4, L = min(16, context)."""
    length = min(MAX_LENGTH, context)
    if length < 2 or vocab_size < 1:
        raise ValueError(f"a canary needs two tokens of context, got {context}, and a vocabulary")
    rng = np.random.default_rng([seed, 0xCA_4A_27])
    return rng.integers(0, vocab_size, size=(NUM_SEQUENCES, length), dtype=np.int32)


def make_canary(score: Score, token_ids: npt.NDArray[np.int32], dtype: torch.dtype) -> Canary:
    """Score the batch under the bytes about to be published.

    Raises:
        ValueError: a log-prob is not finite: such a policy must not be published.
    """
    logprobs = _predicted(score(list(token_ids)), token_ids.shape[1] - 1)
    if not np.isfinite(logprobs).all():
        raise ValueError("the canary's log-probs are not finite: the policy has diverged")
    return Canary(
        token_ids=Array.of(token_ids, "i4"),
        logprobs=Array.of(logprobs, "f8" if dtype == torch.float64 else "f4"),
        tolerance=TOLERANCE[dtype],
    )


def proves_something(canary: Canary, dtype: torch.dtype) -> bool:
    """Return whether a forward in `dtype` can be held to the canary, and whether that says much.

    A forward in a lower dtype than the published one misses the floor with the right weights; a
    floor of 16 bits is met by many wrong ones, too. Digests of the device copy are for both.
    """
    floor = TOLERANCE.get(dtype, float("inf"))
    return floor <= canary.tolerance <= TOLERANCE[torch.float32]


def canary_rows(canary: Canary) -> list[npt.NDArray[Any]]:
    """Return the batch as a `Score` takes it: B arrays [L]."""
    return list(canary.token_ids.numpy())


def check_canary(canary: Canary, score: Score) -> CanaryResult:
    """Score the batch under a materialised version and compare."""
    return compare_canary(canary, score(canary_rows(canary)))


def compare_canary(canary: Canary, scored: Sequence[npt.NDArray[Any]]) -> CanaryResult:
    """Compare what a `Score` returned for the batch."""
    expected = canary.logprobs.numpy().astype(np.float64)
    found = _predicted(scored, expected.shape[1]).astype(np.float64)
    if found.shape != expected.shape or not np.isfinite(found).all():
        return CanaryResult(max_error=float("inf"), ok=False)
    max_error = float(np.abs(found - expected).max(initial=0.0))
    return CanaryResult(max_error=max_error, ok=max_error <= canary.tolerance)


def backend_scorer(backend: Backend, temperature: float = 1.0) -> Score:
    """Return the `Score` of a backend's weights as they are at the time of the call."""

    def score(token_ids: Sequence[npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
        batch = pack(list(token_ids))
        logprobs_T = backend.score(batch, temperature=temperature).cpu()
        return [part.numpy() for part in batch.split(logprobs_T)]

    return score


def _predicted(rows: Sequence[npt.NDArray[Any]], length: int) -> npt.NDArray[Any]:
    """Return log-probs [B, L-1] of every token but the first."""
    if not len(rows):
        return np.zeros((0, length))
    return np.stack([np.asarray(row)[1:] for row in rows])
