"""Which version to stand at and what to score there: a pure state machine.

A *part* is the work one version has in one sequence of one trajectory: the whole prefix up to that
version's last token. Parts queue by version. Standing at a version is cheap and moving is dear, so
a version is visited when a pack is full or a part has waited `max_wait_s`, everything queued there
is scored in one go, and what the current version holds is scored before it is left. The next
version is the nearest due one in the direction of travel, which visits every due version within
two sweeps: nobody starves. Once, after catching up, the newest version is visited without being
asked for, so that the process is ready only when it reproduces a canary.

A version that is not held is waited for (newer than all held), asked for (it should exist) or
given up (gone for good); another version never stands in for it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from services.logit_oracle.orders import (
    Action,
    Arrived,
    Ask,
    AskFailed,
    CaughtUp,
    Drain,
    Event,
    Evict,
    Floor,
    Gone,
    Held,
    Lost,
    Move,
    Moved,
    MoveFailed,
    Part,
    Scored,
    ScorePack,
    Store,
    Tick,
    Unscorable,
)
from shared.algo.batching import balance


@dataclass
class _Queue:
    """Parts of one version, oldest first."""

    parts: list[Part] = field(default_factory=list[Part])
    oldest_at: float = 0.0
    num_tokens: int = 0


class Elevator:
    """The machine; at most one `Move` or `ScorePack` is outstanding.

    Args:
        pack_tokens: token budget of one forward.
        max_wait_s: how long a part may wait for company before its version is due.
        canary_retries: how often a version whose canary disagrees is fetched afresh before its
            tokens are reported unverified.
        ask_retry_s: pause before a version is asked for again after the bus did not answer.
        absent_after_s: how long a version newer than every one held is waited for before it is
            asked for (it was published before any of its tokens was sampled).
    """

    def __init__(
        self,
        *,
        pack_tokens: int,
        max_wait_s: float,
        canary_retries: int,
        ask_retry_s: float,
        absent_after_s: float,
    ) -> None:
        self._pack_tokens = pack_tokens
        self._max_wait_s = max_wait_s
        self._canary_retries = canary_retries
        self._ask_retry_s = ask_retry_s
        self._absent_after_s = absent_after_s
        self._queues: dict[int, _Queue] = {}
        self._left: dict[int, int] = {}  # parts not settled, by job
        self._held: set[int] = set()
        self._asked: set[int] = set()
        self._ask_again_at: dict[int, float] = {}
        self._gone: set[int] = set()
        self._canary_failures: dict[int, int] = {}
        self._head = -1
        self._floor = 0
        self._evicted = 0
        self._current: int | None = None
        self._verified = False
        self._seeking = False
        self.homed = False
        """The newest version held after catching up has been verified."""
        self._direction = 1
        self._packs: list[tuple[Part, ...]] = []  # rest of the visit, last one first
        self._flushed = False
        self._busy: Move | ScorePack | None = None
        self._draining = False

    @property
    def num_parts(self) -> int:
        """Parts queued or being scored."""
        waiting = sum(len(queue.parts) for queue in self._queues.values())
        visit = sum(len(pack) for pack in self._packs)
        return waiting + visit + (len(self._busy.parts) if isinstance(self._busy, ScorePack) else 0)

    @property
    def num_jobs(self) -> int:
        """Trajectories not stored yet."""
        return len(self._left)

    def due_at(self) -> float | None:
        """Return when a `Tick` could change something, None when only another event can."""
        times = list(self._ask_again_at.values())
        for version, queue in self._queues.items():
            if version in self._held or version == self._current:
                if self._busy is None:
                    times.append(queue.oldest_at + self._max_wait_s)
            elif version > self._head and not (
                version in self._asked or version in self._ask_again_at
            ):
                times.append(queue.oldest_at + self._absent_after_s)
        return min(times, default=None)

    def handle(self, event: Event, now: float) -> list[Action]:
        """Take one event and return what to do, in order."""
        actions: list[Action] = []
        match event:
            case Arrived(job, parts):
                self._enqueue(job, parts, now, actions)
            case Held(version):
                self._hold(version)
            case CaughtUp():
                self._seeking = not self.homed
            case Lost(version):
                self._held.discard(version)
            case Gone(version):
                self._forget_ask(version)
                self._held.discard(version)
                self._gone.add(version)
            case AskFailed(version):
                self._asked.discard(version)
                self._ask_again_at[version] = now + self._ask_retry_s
            case Floor(version):
                self._floor = max(self._floor, version)
            case Moved(version, verified):
                self._arrive(version, verified, actions)
            case MoveFailed(version):
                self._busy, self._current = None, None
                self._held.discard(version)
            case Scored():
                assert isinstance(self._busy, ScorePack)
                parts, self._busy = self._busy.parts, None
                self._settle(parts, actions)
            case Drain():
                self._draining = True
            case Tick():
                pass
        self._seek_missing(now, actions)
        self._release(actions)
        if self._busy is None and (work := self._next_work(now)) is not None:
            self._busy = work
            actions.append(work)
        return actions

    def _enqueue(
        self, job: int, parts: tuple[Part, ...], now: float, actions: list[Action]
    ) -> None:
        assert job not in self._left, f"job {job} arrived twice"
        if not parts:
            actions.append(Store(job))
            return
        self._left[job] = len(parts)
        for part in parts:
            queue = self._queues.setdefault(part.version, _Queue(oldest_at=now))
            queue.parts.append(part)
            queue.num_tokens += part.num_tokens

    def _hold(self, version: int) -> None:
        self._forget_ask(version)
        self._held.add(version)
        self._evicted = min(self._evicted, version)
        self._gone.discard(version)
        self._head = max(self._head, version)

    def _forget_ask(self, version: int) -> None:
        self._asked.discard(version)
        self._ask_again_at.pop(version, None)

    def _arrive(self, version: int, verified: bool, actions: list[Action]) -> None:
        self._busy = None
        if verified:
            self._canary_failures.pop(version, None)
            if self._seeking and version == self._newest_trusted():
                self._seeking, self.homed = False, True
        else:
            failures = self._canary_failures.get(version, 0) + 1
            self._canary_failures[version] = failures
            if failures <= self._canary_retries:
                self._current = None
                self._held.discard(version)
                self._asked.add(version)
                actions.append(Ask(version, afresh=True))
                return
        self._current, self._verified = version, verified
        self._start_visit()
        self._flushed = True

    def _settle(self, parts: Iterable[Part], actions: list[Action]) -> None:
        for part in parts:
            self._left[part.job] -= 1
            if not self._left[part.job]:
                del self._left[part.job]
                actions.append(Store(part.job))

    def _seek_missing(self, now: float, actions: list[Action]) -> None:
        """Give up, ask for, or go on waiting for the versions that work needs and nobody holds."""
        for version in sorted(self._queues.keys() | self._ask_again_at.keys()):
            if version in self._held or version == self._current:
                self._ask_again_at.pop(version, None)
                continue
            if version in self._gone or version < self._floor:
                self._forget_ask(version)
                if version in self._queues:
                    parts = tuple(self._queues.pop(version).parts)
                    actions.append(Unscorable(version, parts))
                    self._settle(parts, actions)
            elif version not in self._asked and now >= self._ask_at(version):
                self._forget_ask(version)
                self._asked.add(version)
                actions.append(Ask(version, afresh=version in self._canary_failures))

    def _ask_at(self, version: int) -> float:
        if version in self._ask_again_at:
            return self._ask_again_at[version]
        oldest_at = self._queues[version].oldest_at
        return oldest_at + self._absent_after_s if version > self._head else oldest_at

    def _release(self, actions: list[Action]) -> None:
        """Evict below the floor, but nothing that queued work still needs."""
        needed = [version for version in self._queues if version in self._held]
        if isinstance(self._busy, Move):
            needed.append(self._busy.version)
        below = min([self._floor, *needed])
        if below > self._evicted:
            self._evicted = below
            self._held = {version for version in self._held if version >= below}
            actions.append(Evict(below))

    def _next_work(self, now: float) -> Move | ScorePack | None:
        if self._packs:
            return self._next_pack()
        here = self._current
        if self._seeking and (newest := self._newest_trusted()) not in (None, here):
            return Move(newest)
        elsewhere = [v for v in self._queues if v != here and v in self._held]
        due = [v for v in elsewhere if self._is_due(self._queues[v], now)]
        own = self._queues.get(here) if here is not None else None
        if due:
            if own is not None and not self._flushed:
                self._start_visit()
                self._flushed = True
                return self._next_pack()
            return self._move(due)
        if own is not None and self._is_due(own, now):
            self._start_visit()
            self._flushed = False
            return self._next_pack()
        self._flushed = False
        return None

    def _newest_trusted(self) -> int | None:
        """Return the newest version held whose canary has not failed too often."""
        failures = self._canary_failures
        trusted = (v for v in self._held if failures.get(v, 0) <= self._canary_retries)
        return max(trusted, default=None)

    def _is_due(self, queue: _Queue, now: float) -> bool:
        full = queue.num_tokens >= self._pack_tokens
        return full or self._draining or now >= queue.oldest_at + self._max_wait_s

    def _move(self, due: list[int]) -> Move:
        """Choose the nearest due version in the direction of travel, turning round at the end."""
        here = self._current if self._current is not None else max(due)
        ahead = [v for v in due if (v - here) * self._direction >= 0]
        if not ahead:
            self._direction = -self._direction
            ahead = due
        return Move(min(ahead, key=lambda v: abs(v - here)))

    def _start_visit(self) -> None:
        """Take everything queued at the current version, as token-balanced packs."""
        assert self._current is not None
        queue = self._queues.pop(self._current, None)
        if queue is None:
            return
        packs = balance([part.num_tokens for part in queue.parts], self._pack_tokens)
        self._packs = [tuple(queue.parts[i] for i in pack) for pack in reversed(packs)]

    def _next_pack(self) -> ScorePack:
        assert self._current is not None
        return ScorePack(self._current, self._verified, self._packs.pop())
