import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.algo.batching import balance, share

LENGTHS = st.lists(st.integers(1, 50), max_size=30)


@given(LENGTHS, st.integers(1, 120), st.integers(1, 5))
def test_every_sequence_is_trained_once_and_ranks_work_in_lockstep(
    lengths: list[int], max_tokens: int, ranks: int
):
    shares = share(lengths, max_tokens, ranks)
    assert len(shares) == ranks
    assert sorted(i for packs in shares for pack in packs for i in pack) == list(
        range(len(lengths))
    )
    assert len({len(packs) for packs in shares}) == 1
    for packs in shares:
        for pack in packs:
            assert len(pack) <= 1 or sum(lengths[i] for i in pack) <= max_tokens


@given(LENGTHS, st.integers(2, 5))
def test_ranks_differ_by_at_most_the_longest_sequence(lengths: list[int], ranks: int):
    loads = [sum(lengths[i] for p in packs for i in p) for packs in share(lengths, 60, ranks)]
    assert max(loads) - min(loads) <= max(lengths, default=0)


def test_one_rank_packs_as_ever():
    lengths = [5, 30, 12, 7, 7, 40]
    assert share(lengths, 45, 1) == [balance(lengths, 45)]


def test_a_rank_without_a_second_sequence_to_part_gets_an_empty_pack():
    assert share([9, 4, 4], 9, 2) == [[[0]], [[1, 2]]]
    assert share([9, 9, 9], 9, 2) == [[[0], [2]], [[1], []]]
    assert share([3, 3, 3, 8, 8, 2], 8, 2) == [[[3], [0, 2]], [[4], [1, 5]]]


def test_no_ranks_are_refused():
    with pytest.raises(ValueError, match="at least one rank"):
        share([1], 4, 0)
