"""The elevator as lists: events in, orders out."""

from __future__ import annotations

from services.logit_oracle.elevator import Elevator
from services.logit_oracle.orders import (
    Arrived,
    Ask,
    AskFailed,
    CaughtUp,
    Drain,
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


def elevator(**changes: float) -> Elevator:
    settings = {
        "pack_tokens": 100,
        "max_wait_s": 1.0,
        "canary_retries": 2,
        "ask_retry_s": 0.5,
        "absent_after_s": 30.0,
    }
    return Elevator(**(settings | changes))


def parts(job: int, *versions: int, tokens: int = 10) -> tuple[Part, ...]:
    return tuple(Part(job, index, version, tokens) for index, version in enumerate(versions))


def at_version(version: int, *others: int, **changes: float) -> Elevator:
    """An elevator that stands, verified and idle, at `version` and also holds `others`."""
    machine = elevator(**changes)
    assert machine.handle(Held(version), 0.0) == []
    assert machine.handle(CaughtUp(), 0.0) == [Move(version)]
    assert machine.handle(Moved(version, verified=True), 0.0) == []
    for other in others:
        assert machine.handle(Held(other), 0.0) == []
    return machine


def test_after_catching_up_the_newest_version_is_materialised_once() -> None:
    machine = elevator()
    assert machine.handle(Held(3), 0.0) == []
    assert machine.handle(Held(4), 0.0) == []
    assert machine.handle(CaughtUp(), 0.0) == [Move(4)]
    assert not machine.homed
    assert machine.handle(Moved(4, verified=True), 0.1) == []
    assert machine.homed
    assert machine.handle(Held(5), 0.2) == []
    assert machine.handle(CaughtUp(), 0.2) == []


def test_a_part_waits_for_company_until_it_is_due() -> None:
    machine = at_version(5)
    (part,) = parts(1, 5)
    assert machine.handle(Arrived(1, (part,)), 10.0) == []
    assert machine.due_at() == 11.0
    assert machine.handle(Tick(), 10.9) == []
    assert machine.handle(Tick(), 11.0) == [ScorePack(5, True, (part,))]
    assert machine.due_at() is None
    assert machine.handle(Scored(), 11.1) == [Store(1)]
    assert machine.num_parts == machine.num_jobs == 0


def test_a_full_pack_does_not_wait() -> None:
    machine = at_version(5)
    first, second = parts(1, 5, tokens=60), parts(2, 5, tokens=40)
    assert machine.handle(Arrived(1, first), 10.0) == []
    assert machine.handle(Arrived(2, second), 10.0) == [ScorePack(5, True, first + second)]
    assert machine.handle(Scored(), 10.1) == [Store(1), Store(2)]


def test_a_visit_is_cut_into_packs_within_the_budget_longest_first() -> None:
    machine = at_version(5)
    queued = [Part(1, i, 5, n) for i, n in enumerate((30, 50, 70, 20, 250))]
    actions = machine.handle(Arrived(1, tuple(queued)), 0.0)
    packs = []
    while isinstance(actions[-1], ScorePack):
        packs.append([part.num_tokens for part in actions[-1].parts])
        actions = machine.handle(Scored(), 0.1)
    assert packs == [[250], [70, 30], [50, 20]]
    assert actions == [Store(1)]


def test_a_trajectory_is_stored_when_all_of_its_versions_are_scored() -> None:
    machine = at_version(5, 6)
    old, new = parts(1, 5, 6)
    machine.handle(Arrived(1, (old, new)), 0.0)
    assert machine.handle(Tick(), 1.0) == [ScorePack(5, True, (old,))]
    assert machine.handle(Scored(), 1.1) == [Move(6)]
    assert machine.handle(Moved(6, verified=True), 1.2) == [ScorePack(6, True, (new,))]
    assert machine.handle(Scored(), 1.3) == [Store(1)]


def test_a_trajectory_without_stamped_tokens_is_stored_at_once() -> None:
    assert elevator().handle(Arrived(1, ()), 0.0) == [Store(1)]


def test_what_the_current_version_holds_is_scored_before_it_is_left() -> None:
    machine = at_version(5, 6)
    (due,) = parts(1, 6)
    (young,) = parts(2, 5)
    machine.handle(Arrived(1, (due,)), 0.0)
    machine.handle(Arrived(2, (young,)), 0.9)
    assert machine.handle(Tick(), 1.0) == [ScorePack(5, True, (young,))]
    assert machine.handle(Scored(), 1.1) == [Store(2), Move(6)]


def test_a_current_version_that_is_always_full_does_not_starve_another() -> None:
    machine = at_version(5, 6)
    (waiting,) = parts(0, 6)
    machine.handle(Arrived(0, (waiting,)), 0.0)
    full = {job: parts(job, 5, tokens=200) for job in (1, 2, 3)}
    assert machine.handle(Arrived(1, full[1]), 0.5) == [ScorePack(5, True, full[1])]
    assert machine.handle(Arrived(2, full[2]), 1.5) == []
    assert machine.handle(Scored(), 2.0) == [Store(1), ScorePack(5, True, full[2])]
    assert machine.handle(Arrived(3, full[3]), 2.5) == []
    assert machine.handle(Scored(), 3.0) == [Store(2), Move(6)]


def test_due_versions_are_swept_in_the_direction_of_travel() -> None:
    machine = at_version(5, 1, 3, 6, 8)
    machine.handle(Arrived(1, parts(1, 6, 8, 3, 1)), 0.0)
    order, actions = [], machine.handle(Tick(), 1.0)
    while isinstance(actions[-1], Move):
        order.append(actions[-1].version)
        machine.handle(Moved(order[-1], verified=True), 1.1)
        actions = machine.handle(Scored(), 1.2)
    assert order == [6, 8, 3, 1]
    assert actions == [Store(1)]


def test_a_version_newer_than_all_held_is_waited_for() -> None:
    machine = at_version(5)
    (part,) = parts(1, 6)
    assert machine.handle(Arrived(1, (part,)), 0.0) == []
    assert machine.handle(Tick(), 20.0) == []
    assert machine.handle(Held(6), 20.0) == [Move(6)]
    assert machine.handle(Moved(6, verified=True), 20.1) == [ScorePack(6, True, (part,))]


def test_a_version_that_never_appears_is_asked_for_and_then_unscorable() -> None:
    machine = at_version(5)
    queued = parts(1, 99)
    machine.handle(Arrived(1, queued), 0.0)
    assert machine.due_at() == 30.0
    assert machine.handle(Tick(), 30.0) == [Ask(99, afresh=False)]
    assert machine.due_at() is None
    assert machine.handle(Gone(99), 30.1) == [Unscorable(99, queued), Store(1)]


def test_a_missing_version_is_asked_for_once_and_scored_when_it_comes() -> None:
    machine = at_version(5)
    first, second = parts(1, 3), parts(2, 3)
    assert machine.handle(Arrived(1, first), 0.0) == [Ask(3, afresh=False)]
    assert machine.handle(Arrived(2, second), 0.1) == []
    assert machine.handle(Held(3), 0.5) == []
    assert machine.handle(Tick(), 1.0) == [Move(3)]
    assert machine.handle(Moved(3, verified=True), 1.1) == [ScorePack(3, True, first + second)]


def test_a_bus_that_does_not_answer_is_asked_again_later() -> None:
    machine = at_version(5)
    machine.handle(Arrived(1, parts(1, 3)), 0.0)
    assert machine.handle(AskFailed(3), 2.0) == []
    assert machine.due_at() == 2.5
    assert machine.handle(Tick(), 2.4) == []
    assert machine.handle(Tick(), 2.5) == [Ask(3, afresh=False)]
    assert machine.due_at() is None


def test_a_version_gone_for_good_spoils_only_its_own_tokens() -> None:
    machine = at_version(5)
    gone, alive = parts(1, 3, 5)
    machine.handle(Arrived(1, (gone, alive)), 0.0)
    assert machine.handle(Gone(3), 0.1) == [Unscorable(3, (gone,))]
    assert machine.handle(Tick(), 1.0) == [ScorePack(5, True, (alive,))]
    assert machine.handle(Scored(), 1.1) == [Store(1)]
    late = parts(2, 3)
    assert machine.handle(Arrived(2, late), 2.0) == [Unscorable(3, late), Store(2)]


def test_a_version_whose_canary_disagrees_is_withheld_and_fetched_afresh() -> None:
    machine = at_version(5, 6)
    queued = parts(1, 6)
    machine.handle(Arrived(1, queued), 0.0)
    assert machine.handle(Tick(), 1.0) == [Move(6)]
    assert machine.handle(Moved(6, verified=False), 1.1) == [Ask(6, afresh=True)]
    assert machine.handle(Tick(), 9.0) == []
    assert machine.handle(Held(6), 9.0) == [Move(6)]
    assert machine.handle(Moved(6, verified=True), 9.1) == [ScorePack(6, True, queued)]


def test_a_canary_that_never_agrees_ends_as_unverified_after_bounded_retries() -> None:
    machine = at_version(5, 6)
    queued = parts(1, 6)
    machine.handle(Arrived(1, queued), 0.0)
    actions = machine.handle(Tick(), 1.0)
    for _ in range(2):
        assert actions == [Move(6)]
        assert machine.handle(Moved(6, verified=False), 1.0) == [Ask(6, afresh=True)]
        actions = machine.handle(Held(6), 1.0)
    assert actions == [Move(6)]
    assert machine.handle(Moved(6, verified=False), 1.0) == [ScorePack(6, False, queued)]


def test_a_fetch_afresh_that_got_no_answer_stays_afresh() -> None:
    machine = elevator()
    machine.handle(Held(6), 0.0)
    machine.handle(CaughtUp(), 0.0)
    assert machine.handle(Moved(6, verified=False), 1.0) == [Ask(6, afresh=True)]
    assert machine.handle(AskFailed(6), 2.0) == []
    assert machine.handle(Tick(), 2.5) == [Ask(6, afresh=True)]


def test_a_first_version_that_stays_unverified_gives_way_to_the_next() -> None:
    machine = elevator(canary_retries=0)
    machine.handle(Held(6), 0.0)
    assert machine.handle(CaughtUp(), 0.0) == [Move(6)]
    assert machine.handle(Moved(6, verified=False), 0.1) == []
    assert not machine.homed
    assert machine.handle(Held(7), 0.2) == [Move(7)]
    assert machine.handle(Moved(7, verified=True), 0.3) == []
    assert machine.handle(Held(8), 0.4) == []


def test_a_move_to_a_version_that_has_just_left_the_history_asks_for_it() -> None:
    machine = at_version(5, 6)
    queued = parts(1, 6)
    machine.handle(Arrived(1, queued), 0.0)
    assert machine.handle(Tick(), 1.0) == [Move(6)]
    assert machine.handle(MoveFailed(6), 1.1) == [Ask(6, afresh=False)]


def test_a_lost_version_is_asked_for_when_work_needs_it() -> None:
    machine = at_version(5, 6)
    assert machine.handle(Lost(6), 0.0) == []
    assert machine.handle(Arrived(1, parts(1, 6)), 0.0) == [Ask(6, afresh=False)]


def test_eviction_follows_the_floor_but_spares_queued_work() -> None:
    machine = at_version(5, 2, 3, 4)
    assert machine.handle(Floor(3), 0.0) == [Evict(3)]
    assert machine.handle(Floor(3), 0.0) == []
    queued = parts(1, 4)
    machine.handle(Arrived(1, queued), 0.0)
    assert machine.handle(Floor(5), 0.1) == [Evict(4)]
    assert machine.handle(Tick(), 1.0) == [Move(4)]
    assert machine.handle(Moved(4, verified=True), 1.1) == [
        Evict(5),
        ScorePack(4, True, queued),
    ]


def test_a_version_below_the_floor_is_not_fetched_back() -> None:
    machine = at_version(5)
    machine.handle(Floor(5), 0.0)
    queued = parts(1, 2)
    assert machine.handle(Arrived(1, queued), 0.0) == [Unscorable(2, queued), Store(1)]


def test_a_version_fetched_in_vain_is_evicted_again() -> None:
    machine = at_version(5)
    machine.handle(Floor(5), 0.0)
    assert machine.handle(Held(2), 0.1) == [Evict(5)]


def test_draining_does_not_wait_for_company() -> None:
    machine = at_version(5, 6)
    here, there = parts(1, 5, 6)
    machine.handle(Arrived(1, (here, there)), 0.0)
    assert machine.handle(Drain(), 0.1) == [ScorePack(5, True, (here,))]
    assert machine.handle(Scored(), 0.2) == [Move(6)]
    assert machine.handle(Moved(6, verified=True), 0.3) == [ScorePack(6, True, (there,))]
    assert machine.handle(Scored(), 0.4) == [Store(1)]
