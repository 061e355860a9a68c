"""Admission and the hold rule: tables, and simulations of runs with stragglers."""

from __future__ import annotations

import heapq
import itertools
import random
from dataclasses import dataclass

import pytest

from services.learner.admission import Admission


def in_flight(admission: Admission, **issued_at: int) -> None:
    for group, version in issued_at.items():
        admission.outstanding[group] = version


def test_a_fresh_run_may_issue_p_times_eta_plus_one_groups() -> None:
    assert Admission(4, 2).num_to_issue() == 12


def test_trained_groups_make_room_only_when_their_version_is_published() -> None:
    admission = Admission(2, 1)
    in_flight(admission, a=0, b=0, c=0, d=0)
    admission.release(["a", "b"], trained=True)
    assert admission.num_to_issue() == 0
    admission.publish(1)
    assert admission.num_to_issue() == 2


def test_failed_and_dropped_groups_make_room_at_once() -> None:
    admission = Admission(2, 1)
    in_flight(admission, a=0, b=0, c=0, d=0)
    admission.release(["a"], trained=False)
    assert admission.num_to_issue() == 1


def test_a_tighter_bound_on_groups_in_flight_is_kept() -> None:
    assert Admission(4, 4, max_outstanding=6).num_to_issue() == 6


def test_the_oldest_ready_groups_are_trained_first() -> None:
    admission = Admission(2, 4, version=3)
    in_flight(admission, a=3, b=1, c=2, d=3)
    assert admission.choose(["a", "b", "c", "d"]) == ("b", "c")


def test_too_few_ready_groups_start_no_step() -> None:
    admission = Admission(2, 4)
    in_flight(admission, a=0)
    assert admission.choose(["a"]) == ()


@pytest.mark.parametrize(
    ("issue_version", "held_at"),
    [(0, 0), (1, None), (4, None)],
    ids=["at its last chance", "one version to spare", "fresh"],
)
def test_a_step_is_held_for_a_group_at_its_last_chance(
    issue_version: int, held_at: int | None
) -> None:
    admission = Admission(1, 4, version=4)
    in_flight(admission, slow=issue_version, quick=4)
    assert admission.held_by(["quick"]) == held_at


def test_a_step_is_held_when_later_places_cannot_take_all_old_groups() -> None:
    # Two groups issued at 1 remain; after the step from 4 only version 5 can train them, with
    # one place: the hold must come now, not when the second one is already lost.
    admission = Admission(1, 4, version=4)
    in_flight(admission, old1=1, old2=1, quick=4)
    assert admission.held_by(["quick"]) == 1
    assert admission.held_by(["old1"]) is None


def test_without_hold_the_step_starts_anyway() -> None:
    admission = Admission(1, 0, version=3)
    in_flight(admission, slow=1, quick=3)
    assert admission.choose(["quick"]) == ()
    assert admission.choose(["quick"], hold=False) == ("quick",)


def test_a_hold_with_nothing_left_to_wait_for_ends() -> None:
    """As after a restart with a smaller P: three groups at their last chance, all complete."""
    admission = Admission(1, 1, version=4)
    in_flight(admission, a=3, b=3, c=3)
    assert admission.held_by(["a"]) == 3
    assert admission.choose(["a", "b", "c"]) == ("a",)
    assert admission.choose(["a", "b"]) == ()


@dataclass
class Simulated:
    """What a simulated run showed."""

    versions: int
    staleness: list[int]
    """Of every trained group: version trained from minus issue version."""
    max_outstanding: int


def simulate(
    p: int,
    eta: int,
    *,
    num_versions: int,
    slow_share: float,
    slowness: float,
    failed_share: float = 0.0,
    servers: int = 40,
    hold: bool = True,
    seed: int = 0,
) -> Simulated:
    """Run the loop of the learner against groups with random durations on `servers` servers."""
    rng = random.Random(seed)
    admission = Admission(p, eta)
    numbers = itertools.count()
    now = 0.0
    free_at = [0.0] * servers
    heapq.heapify(free_at)
    finishing: list[tuple[float, str]] = []
    ready: set[str] = set()
    result = Simulated(0, [], 0)
    while result.versions < num_versions:
        for _ in range(admission.num_to_issue()):
            group = f"g{next(numbers):06d}"
            admission.issue(group)
            duration = rng.uniform(0.5, 1.5) * (slowness if rng.random() < slow_share else 1.0)
            start = max(now, heapq.heappop(free_at))
            heapq.heappush(free_at, start + duration)
            heapq.heappush(finishing, (start + duration, group))
        result.max_outstanding = max(result.max_outstanding, len(admission.outstanding))
        batch = admission.choose(ready, hold=hold)
        if batch:
            result.staleness += [admission.version - admission.outstanding[g] for g in batch]
            ready -= set(batch)
            admission.release(batch, trained=True)
            now += 0.2
            admission.publish(admission.version + 1)
            result.versions += 1
            continue
        assert finishing, "deadlock: nothing in flight and no step may start"
        now, group = heapq.heappop(finishing)
        if rng.random() < failed_share:
            admission.release([group], trained=False)
        else:
            ready.add(group)
    return result


@pytest.mark.parametrize("eta", [0, 1, 2, 4])
@pytest.mark.parametrize("seed", range(3))
def test_staleness_never_exceeds_the_bound_with_five_percent_of_groups_12x_slower(
    eta: int, seed: int
) -> None:
    run = simulate(8, eta, num_versions=300, slow_share=0.05, slowness=12.0, seed=seed)
    assert max(run.staleness) <= eta
    assert run.max_outstanding <= 8 * (eta + 1)


def test_counting_alone_lets_staleness_run_away() -> None:
    """The control: without the hold rule the same run passes the bound."""
    free = simulate(8, 4, num_versions=300, slow_share=0.05, slowness=12.0, hold=False)
    assert max(free.staleness) > 4


def test_the_bound_is_used_not_merely_kept() -> None:
    run = simulate(8, 4, num_versions=300, slow_share=0.05, slowness=12.0)
    assert max(run.staleness) == 4


def test_failing_groups_neither_starve_nor_deadlock_the_run() -> None:
    run = simulate(4, 2, num_versions=200, slow_share=0.1, slowness=8.0, failed_share=0.2)
    assert run.versions == 200
    assert max(run.staleness) <= 2


def test_eta_zero_is_synchronous() -> None:
    run = simulate(8, 0, num_versions=50, slow_share=0.05, slowness=12.0)
    assert set(run.staleness) == {0}


def test_no_reachable_state_of_a_small_system_is_a_deadlock() -> None:
    """Explore every order of completions, failures and steps for P = 2, η = 1, to 4 versions."""
    seen: set[tuple[int, int, tuple[int, ...], tuple[int, ...]]] = set()
    frontier = [(0, (0, 0, 0, 0), ())]  # version, running issue versions, ready issue versions
    num_steps = 0
    while frontier:
        version, running, ready = frontier.pop()
        key = (version, 0, running, ready)
        if key in seen or version == 4:
            continue
        seen.add(key)
        admission = Admission(2, 1, version=version)
        names: dict[str, int] = {}
        for kind, issued in (("run", running), ("rdy", ready)):
            for number, issue_version in enumerate(issued):
                names[f"{kind}{number}"] = issue_version
        admission.outstanding = dict(names)
        batch = admission.choose([n for n in names if n.startswith("rdy")])
        assert batch or running, f"deadlock at {key}"
        if batch:
            num_steps += 1
            assert all(version - names[n] <= 1 for n in batch)
            left = [names[n] for n in names if n.startswith("rdy") and n not in batch]
            admission.release(batch, trained=True)
            admission.publish(version + 1)
            fresh = (version + 1,) * admission.num_to_issue()
            frontier.append((version + 1, tuple(sorted(running + fresh)), tuple(sorted(left))))
        for index in range(len(running)):
            rest = running[:index] + running[index + 1 :]
            frontier.append((version, rest, tuple(sorted((*ready, running[index])))))
            frontier.append((version, tuple(sorted((*rest, version))), ready))  # failed, reissued
    assert num_steps > 10
