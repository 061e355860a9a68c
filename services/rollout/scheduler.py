"""Who is forwarded in the next step: admission, prefill, decoding, interruption. Pure, no torch.

    submit -> waiting -> running -> finished
                 |          |  ^
                 |          |  weights_changed: its keys and values count as not forwarded
                 +----------+-> interrupted

A step forwards, for each planned row, the tokens whose keys and values are not in its slot; a row
whose last token is among them samples one token. A row that waits for one token decodes, one that
waits for more is (re-)prefilled; the engine does not distinguish them.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Literal

from services.rollout.prefix_cache import PrefixCache
from shared.wire.trajectory import RoutingRecord

Finish = Literal["stop", "length", "interrupted"]

_GROUP_EDGES = (1, 8, 32)
"""Rows are padded to the most new tokens of their group: decoding, an observation, a prompt."""


@dataclass(slots=True, eq=False)
class Row:
    """One turn being sampled."""

    request_id: str
    tokens: list[int]
    """Prefix and what was sampled so far."""
    max_new_tokens: int
    stop_ids: frozenset[int]
    temperature: float
    seed: int
    seed_offset: int
    routing_held: tuple[int, int] | None = None
    """(version, stop): routing that the caller has."""
    num_prefix: int = field(init=False)
    forwarded: int = 0
    """Tokens whose keys and values are in the slot, all of the present weights."""
    slot: int = -1
    logprobs: list[float] = field(default_factory=list[float])
    spans: list[tuple[int, int, int]] = field(default_factory=list[tuple[int, int, int]])
    """(version, start, stop) over the sampled tokens, tiling them."""
    routing: list[RoutingRecord] = field(default_factory=list[RoutingRecord])
    """Taken from the slot so far."""

    def __post_init__(self) -> None:
        self.num_prefix = len(self.tokens)

    @property
    def num_sampled(self) -> int:
        return len(self.tokens) - self.num_prefix

    def unrecorded(self, version: int) -> tuple[int, int]:
        """Return the tokens [start, stop) whose routing under `version` is to be taken now.

        Everything in the slot that the caller lacks, if that version sampled a token of the answer;
        to be asked before the slot is given up and before other weights overwrite it.
        """
        if not self.spans or self.spans[-1][0] != version:
            return (0, 0)
        held_version, held = self.routing_held or (-1, 0)
        # Of an answer that is only now sampled the caller can have nothing.
        start = min(held, self.num_prefix) if held_version == version else 0
        return (start, max(start, self.forwarded))

    def take(self, token: int, logprob: float, version: int) -> Finish | None:
        """Append a sampled token with its stamp; return why the turn ends, if it does."""
        index = self.num_sampled
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if self.spans and self.spans[-1][0] == version:
            self.spans[-1] = (version, self.spans[-1][1], index + 1)
        else:
            self.spans.append((version, index, index + 1))
        if token in self.stop_ids:
            return "stop"
        return "length" if index + 1 == self.max_new_tokens else None


@dataclass(frozen=True, slots=True)
class Work:
    """Forward `row.tokens[start : start + count]`."""

    row: Row
    start: int
    count: int

    @property
    def samples(self) -> bool:
        """Whether the row's last token is forwarded, so that its successor can be drawn."""
        return self.start + self.count == len(self.row.tokens)


class Scheduler:
    """All rows of one engine.

    Args:
        cache: slots.
        max_running: most rows that hold a slot as running.
        step_tokens: most new tokens of one step, so that a long prefill does not hold up the
            rows that decode; a longer one is spread over several steps.
    """

    def __init__(self, cache: PrefixCache, *, max_running: int, step_tokens: int) -> None:
        if max_running > cache.num_slots:
            raise ValueError(f"{max_running} running rows need as many of {cache.num_slots} slots")
        self._cache = cache
        self._max_running = max_running
        self._step_tokens = step_tokens
        self._waiting: deque[Row] = deque()
        self._running: dict[str, Row] = {}
        self._rows: dict[str, Row] = {}
        self.prefix_hit_tokens = 0

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def idle(self) -> bool:
        return not self._rows

    @property
    def kv_used_ratio(self) -> float:
        return self._cache.num_used / self._cache.num_slots

    def row(self, request_id: str) -> Row | None:
        """Return a row that is waiting or running."""
        return self._rows.get(request_id)

    @property
    def request_ids(self) -> tuple[str, ...]:
        return tuple(self._rows)

    @property
    def running(self) -> tuple[Row, ...]:
        """Rows that hold a slot."""
        return tuple(self._running.values())

    def submit(self, row: Row) -> None:
        """Queue a row.

        Raises:
            ValueError: a row of this request id is not finished yet.
        """
        if row.request_id in self._rows:
            raise ValueError(f"request {row.request_id!r} is being sampled already")
        self._rows[row.request_id] = row
        self._waiting.append(row)

    def plan(self) -> list[list[Work]]:
        """Admit what fits and return the next step's work in groups of similar size."""
        self._admit()
        budget = self._step_tokens
        ready: list[Work] = []
        behind: list[Row] = []
        for row in self._running.values():
            if len(row.tokens) - row.forwarded == 1:
                ready.append(Work(row, row.forwarded, 1))
            else:
                behind.append(row)
        budget -= len(ready)
        for row in behind:
            if budget <= 0 and ready:
                break
            count = min(len(row.tokens) - row.forwarded, max(budget, 1))
            ready.append(Work(row, row.forwarded, count))
            budget -= count
        return _grouped(ready)

    def forwarded(self, work: Work) -> None:
        """Record that the keys and values of `work` are in the slot."""
        work.row.forwarded = work.start + work.count

    def finish(self, row: Row) -> None:
        """Let go of a row; its slot keeps the forwarded prefix."""
        del self._rows[row.request_id]
        if self._running.pop(row.request_id, None) is None:
            self._waiting.remove(row)
        else:
            self._cache.release(row.slot, row.tokens[: row.forwarded])

    def weights_changed(self) -> None:
        """Forget all keys and values: every running row is forwarded again from its start."""
        for row in self._running.values():
            row.forwarded = 0
        self._cache.drop_kept()

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self._max_running:
            lease = self._cache.acquire(self._waiting[0].tokens)
            if lease is None:
                return
            row = self._waiting.popleft()
            row.slot, row.forwarded = lease.slot, lease.reused
            self.prefix_hit_tokens += lease.reused
            self._running[row.request_id] = row


def _grouped(works: list[Work]) -> list[list[Work]]:
    """Split by number of new tokens, order kept inside; empty groups are left out."""
    groups: list[list[Work]] = [[] for _ in range(len(_GROUP_EDGES) + 1)]
    for work in works:
        groups[sum(work.count > edge for edge in _GROUP_EDGES)].append(work)
    return [group for group in groups if group]
