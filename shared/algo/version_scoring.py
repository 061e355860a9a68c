"""Which prefix to forward under which version, so that every token meets its own policy.

The old log-prob of a token stamped v is computed with the *entire* prefix (prompt, environment
tokens, tokens of other versions) processed by version v: never the segment in isolation. A
sequence of K versions costs K forwards, each only as long as its last own token
(`offpolicy.md` 5.5 and 9.3; arXiv 2605.12070 for the snapshot protocol).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


class StampedSpan(Protocol):
    """Tokens [start, stop) sampled by one version, as `shared.wire.trajectory.Span`."""

    @property
    def version(self) -> int: ...
    @property
    def start(self) -> int: ...
    @property
    def stop(self) -> int: ...


@dataclass(frozen=True)
class VersionPart:
    """What one version has to score of one sequence: forward the prefix, keep the positions."""

    version: int
    prefix_len: int
    """L_{i,v}: index of the last token stamped with the version, plus one."""
    positions: np.ndarray
    """i64, ascending: tokens stamped with the version; token t's log-prob stands at t."""


def parts_by_version(spans: Sequence[StampedSpan]) -> list[VersionPart]:
    """Split the stamps of one sequence by version, ascending by version.

    Raises:
        ValueError: an empty or negative span, or two spans that claim one token.
    """
    ranges: dict[int, list[tuple[int, int]]] = {}
    end = 0
    for span in sorted(spans, key=lambda s: s.start):
        if not 0 <= span.start < span.stop:
            raise ValueError(f"span {span.start}:{span.stop} is empty or negative")
        if span.start < end:
            raise ValueError(f"span {span.start}:{span.stop} overlaps the one that ends at {end}")
        end = span.stop
        ranges.setdefault(span.version, []).append((span.start, span.stop))
    return [
        VersionPart(
            version=version,
            prefix_len=parts[-1][1],
            positions=np.concatenate([np.arange(a, b, dtype=np.int64) for a, b in parts]),
        )
        for version, parts in sorted(ranges.items())
    ]


def forward_tokens(parts: Sequence[VersionPart]) -> int:
    """Return the tokens to forward for one sequence: Σ over its versions of L_{i,v}."""
    return sum(part.prefix_len for part in parts)
