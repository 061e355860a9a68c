"""The elevator under random traffic: nothing lost, nothing doubled, waits bounded, few moves."""

from __future__ import annotations

import heapq
import random
from collections import Counter
from dataclasses import dataclass, field

import pytest

from services.logit_oracle.elevator import Elevator
from services.logit_oracle.orders import (
    Action,
    Arrived,
    Ask,
    AskFailed,
    CaughtUp,
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

MAX_WAIT_S = 0.25
MOVE_S = 0.01
TOKENS_PER_S = 100_000


@dataclass
class World:
    """A shell without a bus: performs orders after a while and keeps the accounts."""

    machine: Elevator
    rng: random.Random
    faults: float
    now: float = 0.0
    agenda: list[tuple[float, int, Event]] = field(default_factory=list)
    held: set[int] = field(default_factory=set)
    gone: set[int] = field(default_factory=set)
    at: int = -1
    verified: bool = False
    outstanding: int = 0
    moves: int = 0
    settled: Counter[tuple[int, int]] = field(default_factory=Counter)
    stored: dict[int, float] = field(default_factory=dict)
    unscorable: set[int] = field(default_factory=set)
    ticket: int = 0
    num_ticks: int = 0

    def after(self, delay_s: float, event: Event) -> None:
        self.ticket += 1
        heapq.heappush(self.agenda, (self.now + delay_s, self.ticket, event))

    def run(self, until: float) -> None:
        while True:
            due = self.machine.due_at()
            next_at = self.agenda[0][0] if self.agenda else float("inf")
            if due is not None and due < next_at:
                assert self.num_ticks < 20_000, "the machine wakes for nothing"
                self.num_ticks += 1
                self.now, event = max(self.now, due), Tick()
            elif self.agenda:
                self.now, _, event = heapq.heappop(self.agenda)
            else:
                return
            if self.now > until:
                return
            if isinstance(event, Moved | Scored | MoveFailed):
                self.outstanding -= 1
            if isinstance(event, Held):
                self.held.add(event.version)
            for action in self.machine.handle(event, self.now):
                self.perform(action)
            assert self.outstanding <= 1

    def perform(self, action: Action) -> None:
        match action:
            case Move(version):
                self.outstanding += 1
                self.moves += 1
                if version not in self.held:
                    self.after(MOVE_S, MoveFailed(version))
                    return
                self.at, self.verified = version, self.rng.random() >= self.faults
                self.after(MOVE_S, Moved(version, self.verified))
            case ScorePack(version, verified, parts):
                self.outstanding += 1
                assert version == self.at
                assert verified == self.verified
                assert all(part.version == version for part in parts)
                tokens = sum(part.num_tokens for part in parts)
                assert tokens <= 2000 or len(parts) == 1
                self.settled.update((part.job, part.index) for part in parts)
                self.after(tokens / TOKENS_PER_S, Scored())
            case Ask(version):
                if self.rng.random() < self.faults:
                    self.after(0.5, AskFailed(version))
                elif version in self.gone:
                    self.after(0.02, Gone(version))
                else:
                    self.after(0.02, Held(version))
            case Unscorable(version, parts):
                self.unscorable.add(version)
                self.settled.update((part.job, part.index) for part in parts)
            case Store(job):
                assert job not in self.stored
                self.stored[job] = self.now
            case Evict(below):
                self.held = {version for version in self.held if version >= below}


def traffic(
    world: World, *, num_jobs: int, per_s: float, publish_s: float, spread: int
) -> dict[int, tuple[float, tuple[Part, ...]]]:
    """Jobs of 1 to 3 recent versions while versions are published, as in the demo."""
    world.after(0.0, CaughtUp())
    last = int(num_jobs / per_s / publish_s) + spread + 1
    for version in range(last + 1):
        at = max(0.0, (version - spread) * publish_s)
        world.after(at + world.rng.uniform(0.0, min(publish_s, 0.3)), Held(version))
        if version > 2 * spread:
            world.after(at, Floor(version - 2 * spread))
    jobs: dict[int, tuple[float, tuple[Part, ...]]] = {}
    for job in range(num_jobs):
        at = job / per_s
        newest = int(at / publish_s) + spread
        versions = sorted(
            {max(0, newest - world.rng.randrange(spread)) for _ in range(world.rng.randint(1, 3))}
        )
        parts = tuple(
            Part(job, index, version, world.rng.randint(20, 120))
            for index, version in enumerate(versions)
        )
        jobs[job] = (at, parts)
        world.after(at, Arrived(job, parts))
    return jobs


def new_world(seed: int, *, faults: float = 0.0) -> World:
    machine = Elevator(
        pack_tokens=2000,
        max_wait_s=MAX_WAIT_S,
        canary_retries=2,
        ask_retry_s=0.5,
        absent_after_s=5.0,
    )
    return World(machine, random.Random(seed), faults)


@pytest.mark.parametrize("seed", range(8))
def test_no_trajectory_is_lost_or_doubled_whatever_fails(seed: int) -> None:
    world = new_world(seed, faults=0.1)
    jobs = traffic(world, num_jobs=600, per_s=150.0, publish_s=0.3, spread=4)
    world.gone = {3, 7}
    for at, event in ((0.5, Lost(4)), (1.0, Lost(6)), (1.5, Lost(8)), (2.0, Gone(7))):
        world.held.discard(event.version)
        world.after(at, event)
    world.run(until=300.0)
    assert set(world.stored) == set(jobs)
    wanted = {(part.job, part.index) for _, parts in jobs.values() for part in parts}
    assert set(world.settled) == wanted
    assert set(world.settled.values()) == {1}
    assert world.machine.num_jobs == world.machine.num_parts == 0


@pytest.mark.parametrize("seed", range(4))
def test_waits_are_bounded_and_moves_are_few(seed: int) -> None:
    world = new_world(seed)
    jobs = traffic(world, num_jobs=1500, per_s=300.0, publish_s=0.3, spread=4)
    world.run(until=300.0)
    assert not world.unscorable
    waits = sorted(world.stored[job] - at for job, (at, _) in jobs.items())
    assert waits[len(waits) // 2] < 2 * MAX_WAIT_S
    assert waits[-1] < 4 * MAX_WAIT_S + 0.3  # a version may be published 0.3 s late
    naive, at = 0, -1
    for _, parts in jobs.values():
        for part in parts:
            naive += part.version != at
            at = part.version
    assert world.moves < naive / 15
    seconds = max(world.stored.values())
    assert world.moves / seconds < 1.2 * 5 / MAX_WAIT_S  # each of about 5 versions once a wait


def test_an_overloaded_elevator_starves_no_version() -> None:
    world = new_world(1)
    jobs = traffic(world, num_jobs=3000, per_s=1500.0, publish_s=1e9, spread=6)
    world.run(until=300.0)
    assert set(world.stored) == set(jobs)
    order = sorted(jobs, key=lambda job: world.stored[job])
    displaced = max(abs(place - job) for place, job in enumerate(order))
    assert displaced < 2000  # two sweeps over six versions, never to the end of the queue
