"""Episodes of two lengths, for measuring what long tails cost; learnable, and quickly so.

The policy writes letters; nothing ends an answer but its length. A hash of the first answer says
whether the episode is a long one, so that lengths differ within a group and come from what the
engine sampled. Half of all tokens lie in long episodes:

    long = tail_ratio * mean_tokens, with probability 1 / (2 tail_ratio); the rest are short, all
    of one length, so that the mean is mean_tokens; tail_ratio 1: all the same.

Reward: share of letters from the first half of the alphabet, 0.5 for a policy that draws evenly.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from services.env_agents.environment import Observation, StepResult
from services.env_agents.tasks.options import checked
from shared.wire.messages import TaskRef

ALPHABET = "abcdefghijklmnopqrstuvwxyz012345"
GOOD = frozenset(ALPHABET[: len(ALPHABET) // 2])


class LongTail:
    """One episode. Satisfies `Environment`.

    Args:
        options: `mean_tokens` (128: sampled tokens of an episode), `tail_ratio` (1: the longest
            over the mean), `turn_tokens` (32: longest answer; also the first one's length).

    Raises:
        ValueError: an unknown option, or lengths that do not fit one another.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        known = {"mean_tokens": 128, "tail_ratio": 1, "turn_tokens": 32}
        values = checked("LongTail", options, known)
        self._mean = int(values["mean_tokens"])
        self._ratio = float(values["tail_ratio"])
        self._turn = int(values["turn_tokens"])
        if self._ratio < 1 or not 0 < self._turn <= lengths(self._mean, self._ratio)[0]:
            raise ValueError(
                "LongTail needs tail_ratio >= 1 and 0 < turn_tokens <= the short episodes' length "
                f"({lengths(self._mean, max(1.0, self._ratio))[0]})"
            )
        self._left = 0
        self._written = ""

    async def reset(self, task: TaskRef) -> Observation:
        self._prompt = _letters(f"{task.split}/{task.seed}/{task.index}", 4)
        return Observation(self._prompt, max_new_tokens=self._turn)

    async def step(self, answer: str) -> StepResult:
        if not self._written:
            short, long = lengths(self._mean, self._ratio)
            share = _hash(answer) / 2**64
            is_long = self._ratio > 1 and share < 1 / (2 * self._ratio)
            self._left = long if is_long else short
        self._written += answer
        self._left -= len(answer)
        if self._left <= 0:
            reward = sum(letter in GOOD for letter in self._written) / len(self._written)
            return StepResult(Observation(), reward=reward, terminated=True)
        return StepResult(Observation("a", max_new_tokens=min(self._turn, self._left)))

    def task_digest(self) -> str:
        return hashlib.sha256(self._prompt.encode()).hexdigest()[:16]

    async def close(self) -> None:
        """Nothing is held."""


class Letters:
    """One token per letter, and none that ends an answer. Satisfies `Renderer`."""

    def __init__(self, model_dir: str, options: Mapping[str, Any]) -> None:
        del model_dir, options
        self.stop_ids: tuple[int, ...] = ()

    def prompt(self, text: str) -> list[int]:
        return [ALPHABET.index(letter) for letter in text]

    def observation(self, text: str) -> list[int]:
        return self.prompt(text)

    def decode(self, ids: list[int]) -> str:
        return "".join(ALPHABET[i] for i in ids)


def lengths(mean_tokens: int, tail_ratio: float) -> tuple[int, int]:
    """Return the sampled tokens of a short and of a long episode."""
    if tail_ratio == 1:
        return mean_tokens, mean_tokens
    share = 1 / (2 * tail_ratio)
    return round(mean_tokens * 0.5 / (1 - share)), round(mean_tokens * tail_ratio)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _letters(text: str, count: int) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return "".join(ALPHABET[byte % len(ALPHABET)] for byte in digest[:count])
