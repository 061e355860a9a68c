from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from shared.weights.ordered import ordered_map


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_results_come_in_the_order_of_the_items(threads: int) -> None:
    def work(i: int) -> int:
        time.sleep(0.002 * (i % 3))
        return i * i

    assert list(ordered_map(work, range(20), threads)) == [i * i for i in range(20)]


@pytest.mark.parametrize("threads", [1, 3])
def test_items_are_taken_only_so_far_ahead_of_what_was_yielded(threads: int) -> None:
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        while taken < 100:
            taken += 1
            yield taken

    for yielded, _ in enumerate(ordered_map(lambda i: i, items(), threads), 1):
        assert taken <= yielded + 2 * threads


@pytest.mark.parametrize("threads", [1, 3])
def test_work_runs_on_so_many_threads_at_once(threads: int) -> None:
    together = threading.Barrier(threads)
    assert list(ordered_map(lambda _: together.wait(5), range(3 * threads), threads))


@pytest.mark.parametrize("threads", [1, 3])
def test_after_a_failure_no_work_is_running_and_no_more_is_started(threads: int) -> None:
    running, started = set[int](), set[int]()

    def work(i: int) -> None:
        started.add(i)
        running.add(i)
        time.sleep(0.01)
        running.discard(i)
        if i == 4:
            raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        list(ordered_map(work, range(1000), threads))
    assert running == set()
    assert len(started) <= 5 + 2 * threads


@pytest.mark.parametrize("threads", [1, 3])
def test_after_closing_no_work_is_running(threads: int) -> None:
    running = set[int]()

    def work(i: int) -> None:
        running.add(i)
        time.sleep(0.01)
        running.discard(i)

    results = ordered_map(work, range(1000), threads)
    next(results)
    results.close()
    assert running == set()
