from __future__ import annotations

import pytest

from services.rollout.prefix_cache import PrefixCache
from services.rollout.scheduler import Row, Scheduler


def make_row(name: str, length: int, new: int = 4, stop: tuple[int, ...] = ()) -> Row:
    return Row(
        request_id=name,
        tokens=list(range(length)),
        max_new_tokens=new,
        stop_ids=frozenset(stop),
        temperature=1.0,
        seed=0,
        seed_offset=0,
    )


def make_scheduler(slots: int = 4, running: int = 4, step_tokens: int = 100) -> Scheduler:
    return Scheduler(PrefixCache(slots), max_running=running, step_tokens=step_tokens)


def step(scheduler: Scheduler, version: int = 0) -> dict[str, tuple[int, int]]:
    """Plan, forward and sample token 99 where one is due; return (start, count) per row."""
    works = [work for group in scheduler.plan() for work in group]
    for work in works:
        scheduler.forwarded(work)
        if work.start + work.count == len(work.row.tokens):
            finish = work.row.take(99, -1.0, version)
            if finish is not None:
                scheduler.finish(work.row)
    return {work.row.request_id: (work.start, work.count) for work in works}


def test_a_prompt_is_prefilled_whole_and_then_decoded_token_by_token() -> None:
    scheduler = make_scheduler()
    scheduler.submit(make_row("a", 20, new=3))
    assert [step(scheduler) for _ in range(3)] == [
        {"a": (0, 20)},
        {"a": (20, 1)},
        {"a": (21, 1)},
    ]
    assert scheduler.idle


def test_rows_are_grouped_by_how_many_tokens_they_bring() -> None:
    scheduler = make_scheduler(slots=8, running=8, step_tokens=1000)
    for name, length in (("decode", 1), ("turn", 6), ("prompt", 30), ("long", 90), ("turn2", 8)):
        scheduler.submit(make_row(name, length))
    groups = [[work.row.request_id for work in group] for group in scheduler.plan()]
    assert groups == [["decode"], ["turn", "turn2"], ["prompt"], ["long"]]


def test_decoding_rows_go_first_and_a_long_prefill_is_spread_over_steps() -> None:
    scheduler = make_scheduler(step_tokens=30)
    scheduler.submit(make_row("a", 5, new=9))
    step(scheduler)
    scheduler.submit(make_row("long", 70))
    assert step(scheduler) == {"a": (5, 1), "long": (0, 29)}
    assert step(scheduler) == {"a": (6, 1), "long": (29, 29)}
    assert step(scheduler) == {"a": (7, 1), "long": (58, 12)}
    assert step(scheduler) == {"a": (8, 1), "long": (70, 1)}


def test_no_more_rows_run_than_allowed_and_the_rest_wait_in_order() -> None:
    scheduler = make_scheduler(running=2)
    for name in ("a", "b", "c", "d"):
        scheduler.submit(make_row(name, 5, new=2))
    assert set(step(scheduler)) == {"a", "b"}
    assert (scheduler.num_running, scheduler.num_waiting) == (2, 2)
    assert set(step(scheduler)) == {"a", "b"}
    assert set(step(scheduler)) == {"c", "d"}


def test_changed_weights_send_every_running_row_back_to_its_first_token() -> None:
    scheduler = make_scheduler()
    scheduler.submit(make_row("a", 20))
    scheduler.submit(make_row("b", 30))
    step(scheduler, version=1)
    scheduler.weights_changed()
    assert step(scheduler, version=2) == {"a": (0, 21), "b": (0, 31)}
    row = scheduler.row("a")
    assert row is not None
    assert row.spans == [(1, 0, 1), (2, 1, 2)]


def test_changed_weights_interrupt_a_prefill_half_way_and_restart_it() -> None:
    scheduler = make_scheduler(step_tokens=10)
    scheduler.submit(make_row("a", 25))
    assert step(scheduler) == {"a": (0, 10)}
    scheduler.weights_changed()
    assert step(scheduler) == {"a": (0, 10)}


def test_a_finished_turn_leaves_its_prefix_to_the_next_one() -> None:
    scheduler = make_scheduler()
    scheduler.submit(make_row("turn0", 20, new=2))
    step(scheduler)
    step(scheduler)
    following = make_row("turn1", 20)
    following.tokens += [99, 99, 7]
    scheduler.submit(following)
    # The second sampled token was never forwarded.
    assert step(scheduler) == {"turn1": (21, 2)}
    assert scheduler.prefix_hit_tokens == 21


def test_a_row_that_ends_while_waiting_was_never_given_a_slot() -> None:
    scheduler = make_scheduler(slots=1, running=1)
    scheduler.submit(make_row("a", 5))
    waiting = make_row("b", 5)
    scheduler.submit(waiting)
    step(scheduler)
    scheduler.finish(waiting)
    assert (scheduler.num_running, scheduler.num_waiting, waiting.slot) == (1, 0, -1)


def test_a_turn_ends_at_its_stop_token_or_its_length() -> None:
    row = make_row("a", 3, new=3, stop=(8,))
    assert row.take(7, -0.5, 0) is None
    assert row.take(8, -0.5, 0) == "stop"
    other = make_row("b", 3, new=2)
    assert other.take(7, -0.5, 0) is None
    assert other.take(8, -0.5, 1) == "length"
    assert other.spans == [(0, 0, 1), (1, 1, 2)]


def test_a_request_id_is_sampled_once_at_a_time() -> None:
    scheduler = make_scheduler()
    scheduler.submit(make_row("a", 5))
    with pytest.raises(ValueError, match="'a' is being sampled already"):
        scheduler.submit(make_row("a", 5))


def test_more_running_rows_than_slots_are_refused() -> None:
    with pytest.raises(ValueError, match="5 running rows"):
        make_scheduler(slots=4, running=5)


@pytest.mark.parametrize(
    ("held", "sampled_under", "asked_of", "expected"),
    [
        (None, [0, 0], 0, (0, 11)),
        ((0, 6), [0, 0], 0, (6, 11)),
        ((0, 90), [0, 0], 0, (10, 11)),
        ((1, 6), [0, 0], 0, (0, 11)),
        ((0, 6), [0, 1], 1, (0, 11)),
        ((0, 6), [0, 1], 0, (0, 0)),
        ((0, 6), [], 0, (0, 0)),
    ],
    ids=["all", "held", "held beyond", "of another", "newer", "not the last", "nothing sampled"],
)
def test_the_routing_to_be_taken_is_what_the_last_version_forwarded_and_the_caller_lacks(
    held: tuple[int, int] | None,
    sampled_under: list[int],
    asked_of: int,
    expected: tuple[int, int],
) -> None:
    row = make_row("a", 10)
    row.routing_held = held
    row.forwarded = 9
    for version in sampled_under:
        row.forwarded = len(row.tokens)
        row.take(5, -1.0, version)
    assert row.unrecorded(asked_of) == expected
