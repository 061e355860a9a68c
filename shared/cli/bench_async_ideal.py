"""What asynchrony can gain at most, from lengths alone. Pure.

A synchronous version takes as long as its episodes, played together to the last one, and then the
training; an ideal asynchronous one keeps the engine full and trains meanwhile.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Engine:
    """How fast one engine samples."""

    rates: Mapping[int, float]
    """Tokens/s by number of episodes at once, measured bare."""
    slots: int
    """Turns that it runs at once."""

    def rate(self, episodes: int) -> float:
        """Tokens/s with so many episodes in play, linear between what was measured."""
        count = min(episodes, self.slots)
        below = max(c for c in self.rates if c <= count)
        above = min(c for c in self.rates if c >= count)
        if below == above:
            return self.rates[below]
        part = (count - below) / (above - below)
        return self.rates[below] + part * (self.rates[above] - self.rates[below])


def play_s(lengths: Sequence[int], engine: Engine, in_play: int, env_latency_s: float = 0) -> float:
    """Return the seconds for all episodes, `in_play` of them at once, in the given order.

    Those in play share the engine evenly; one that ends makes place for the next.

    Args:
        lengths: sampled tokens per episode.
        engine: that samples them.
        in_play: episodes at once.
        env_latency_s: what an episode spends outside the engine; of the last one it cannot be
            hidden.
    """
    waiting = list(reversed(lengths))
    left: list[float] = []
    spent = 0.0
    while waiting or left:
        while waiting and len(left) < in_play:
            left.append(float(waiting.pop()))
        each = engine.rate(len(left)) / len(left)
        shortest = min(left)
        spent += shortest / each
        left = [tokens - shortest for tokens in left if tokens > shortest]
    return spent + env_latency_s


def full_s(lengths: Sequence[int], engine: Engine) -> float:
    """Return the seconds for as many tokens with the engine always full."""
    return sum(lengths) / engine.rate(engine.slots)


def ideal_gain(
    batches: Sequence[Sequence[int]], engine: Engine, in_play: int, train_s: float,
    env_latency_s: float = 0,
) -> float:  # fmt: skip
    """Return how many times faster than synchronous an ideal asynchronous run trains tokens.

    Args:
        batches: sampled tokens per episode, of each version.
        engine: of both.
        in_play: episodes at once of the synchronous one.
        train_s: scoring, training and publishing of one version.
        env_latency_s: see `play_s`.
    """
    played = sum(play_s(batch, engine, in_play, env_latency_s) for batch in batches)
    trained = train_s * len(batches)
    full = sum(full_s(batch, engine) for batch in batches)
    return (played + trained) / max(full, trained)
