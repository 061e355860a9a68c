"""What `make bench-learner` trains on: the same sequences for everybody, as one file of arrays.

numpy only, so that a process with TRL's environment reads it too.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

PROMPT_SHARE = 8
"""One token in so many is prompt, at least one: it is read and not trained."""
SIGMA, SHORTEST, LONGEST = 1.0, 16, 8
"""Long-tailed lengths are log-normal with this σ, at least SHORTEST tokens, at most LONGEST times
their mean."""


@dataclass(frozen=True)
class Sequences:
    """B sequences in the order in which they arrive."""

    token_ids: tuple[npt.NDArray[np.int64], ...]
    prompts: tuple[int, ...]
    """Tokens of each prompt; the rest was sampled and carries loss."""
    advantages: tuple[float, ...]
    old_logprobs: tuple[npt.NDArray[np.float32], ...]
    """[T_i]: the current policy's, 0 at prompts: every ratio is 1, and all objectives agree."""

    @property
    def num_tokens(self) -> int:
        return sum(len(ids) for ids in self.token_ids)

    @property
    def num_loss_tokens(self) -> int:
        return self.num_tokens - sum(self.prompts)

    def save(self, path: Path) -> None:
        np.savez(
            path,
            lengths=[len(ids) for ids in self.token_ids],
            token_ids=np.concatenate(self.token_ids),
            prompts=self.prompts,
            advantages=self.advantages,
            old_logprobs=np.concatenate(self.old_logprobs),
        )

    @classmethod
    def load(cls, path: Path) -> Sequences:
        with np.load(path) as held:
            cuts = np.cumsum(held["lengths"])[:-1]
            return cls(
                tuple(np.split(held["token_ids"], cuts)),
                tuple(int(n) for n in held["prompts"]),
                tuple(float(a) for a in held["advantages"]),
                tuple(np.split(held["old_logprobs"], cuts)),
            )

    def with_old_logprobs(self, rows: list[npt.NDArray[np.float32]]) -> Sequences:
        """Return the same sequences with the log-probs of their sampled tokens."""
        kept = tuple(
            np.where(np.arange(len(row)) >= prompt, row, np.float32(0))
            for row, prompt in zip(rows, self.prompts, strict=True)
        )
        return Sequences(self.token_ids, self.prompts, self.advantages, kept)


def draw(lengths: list[int], vocab: int, seed: int = 0) -> Sequences:
    """Draw random tokens and advantages."""
    rng = np.random.default_rng(seed)
    return Sequences(
        tuple(rng.integers(0, vocab, length) for length in lengths),
        tuple(max(1, length // PROMPT_SHARE) for length in lengths),
        tuple(float(a) for a in rng.normal(size=len(lengths))),
        tuple(np.zeros(length, np.float32) for length in lengths),
    )


def long_tailed(count: int, mean: int, seed: int = 0) -> list[int]:
    """Return `count` lengths of log-normal size that sum to `count` · `mean`, at least SHORTEST."""
    rng = np.random.default_rng(seed)
    raw = rng.lognormal(0.0, SIGMA, count)
    total, longest = count * mean, LONGEST * mean
    lengths = np.clip(np.rint(raw * total / raw.sum()), SHORTEST, longest).astype(int)
    while (rest := total - int(lengths.sum())) != 0:
        movable = lengths < longest if rest > 0 else lengths > SHORTEST
        chosen = np.flatnonzero(movable)[: abs(rest)]
        lengths[chosen] += np.sign(rest)
    return [int(n) for n in rng.permutation(lengths)]
