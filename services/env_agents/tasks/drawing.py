"""Tasks drawn from (seed, index), held out by content.

A task belongs to the split `eval` if and only if a hash of its *content* falls into the first
fifth of the hash space: splitting by seed alone leaves small task spaces mostly in common.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TypeVar

from shared.wire.messages import TaskRef

EVAL_FIFTH = 2**64 // 5

MAX_DRAWS = 1000
"""After so many draws a split is given up as empty."""

Drawn = TypeVar("Drawn")


def content_digest(*parts: str) -> str:
    """Digest of a content: blake2b-64, 16 hex digits."""
    joined = "\x00".join(parts)
    return hashlib.blake2b(joined.encode(), digest_size=8).hexdigest()


def draw(task: TaskRef, make: Callable[[int], Drawn], content: Callable[[Drawn], str]) -> Drawn:
    """Draw tasks from 31-bit seeds until one belongs to the task's split.

    Args:
        task: whose `seed`, `index` and `split` (`train` or `eval`) determine the result.
        make: a task from a seed.
        content: the digest of a task's content.

    Raises:
        ValueError: no such split, or none of MAX_DRAWS tasks belongs to it.
    """
    if task.split not in ("train", "eval"):
        raise ValueError(f"the splits are train and eval, not {task.split!r}")
    for attempt in range(MAX_DRAWS):
        number = int(content_digest(str(task.seed), str(task.index), str(attempt)), 16)
        drawn = make(number >> 33)
        if (int(content(drawn), 16) < EVAL_FIFTH) == (task.split == "eval"):
            return drawn
    raise ValueError(f"none of {MAX_DRAWS} tasks drawn belongs to the split {task.split}")
