from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.rollout.prefix_cache import KEY_TOKENS, Lease, PrefixCache

PROMPT = tuple(range(KEY_TOKENS + 4))


def test_a_finished_prefix_is_found_by_the_turn_that_continues_it() -> None:
    cache = PrefixCache(2)
    first = cache.acquire(PROMPT)
    assert first == Lease(0, 0)
    cache.release(0, PROMPT)
    assert cache.acquire((*PROMPT, 7, 8)) == Lease(0, len(PROMPT))


def test_the_last_token_is_always_forwarded_again() -> None:
    cache = PrefixCache(1)
    cache.acquire(PROMPT)
    cache.release(0, PROMPT)
    assert cache.acquire(PROMPT) == Lease(0, len(PROMPT) - 1)


def test_of_several_prefixes_the_longest_is_taken() -> None:
    cache = PrefixCache(3)
    for length in (17, 20, 18):
        lease = cache.acquire((*range(100, 100 + KEY_TOKENS),))
        assert lease is not None
        cache.release(lease.slot, tuple(range(length)))
    lease = cache.acquire(tuple(range(30)))
    assert lease is not None
    assert lease.reused == 20


def test_a_sibling_with_the_same_prompt_does_not_take_a_longer_prefix() -> None:
    cache = PrefixCache(2)
    cache.acquire(PROMPT)
    cache.release(0, (*PROMPT, 5, 6))
    sibling = cache.acquire((*PROMPT, 5, 9))
    assert sibling == Lease(1, 0)
    assert cache.acquire((*PROMPT, 5, 6, 1)) == Lease(0, len(PROMPT) + 2)


def test_short_prefixes_are_not_kept() -> None:
    cache = PrefixCache(1)
    cache.acquire((1, 2))
    cache.release(0, (1, 2))
    assert (cache.num_kept, cache.num_used) == (0, 0)


def test_the_least_recently_kept_prefix_gives_way_first() -> None:
    cache = PrefixCache(2)
    prefixes = [tuple(range(i, i + KEY_TOKENS)) for i in (0, 100)]
    for prefix in prefixes:
        lease = cache.acquire(prefix)
        assert lease is not None
        cache.release(lease.slot, prefix)
    other = cache.acquire(tuple(range(500, 520)))
    assert other is not None
    assert other.reused == 0
    kept = cache.acquire((*prefixes[1], 3))
    assert kept is not None
    assert kept.reused == KEY_TOKENS
    assert cache.acquire((*prefixes[0], 3)) is None
    assert cache.evictions == 1


def test_dropping_kept_prefixes_leaves_running_slots_alone() -> None:
    cache = PrefixCache(3)
    cache.acquire(PROMPT)
    cache.release(0, PROMPT)
    running = cache.acquire((9,) * 20)
    assert cache.drop_kept() == 1
    assert cache.acquire((*PROMPT, 1)) in (Lease(0, 0), Lease(2, 0))
    assert running is not None
    assert cache.num_used == 2


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2), st.integers(14, 24)), max_size=60))
def test_a_slot_is_never_leased_twice_and_never_lost(
    steps: list[tuple[int, int, int]],
) -> None:
    cache = PrefixCache(4)
    running: dict[int, tuple[int, ...]] = {}
    for what, base, length in steps:
        ids = tuple(range(base, base + length))
        if what == 0 and running:
            slot, held = running.popitem()
            cache.release(slot, held)
        elif what == 1:
            cache.drop_kept()
        else:
            lease = cache.acquire(ids)
            assert (lease is None) == (len(running) == 4)
            if lease is not None:
                assert lease.slot not in running
                assert 0 <= lease.reused < len(ids)
                running[lease.slot] = ids
        assert cache.num_used == len(running) + cache.num_kept
