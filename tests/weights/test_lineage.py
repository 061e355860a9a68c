from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.weights.lineage import Hop, Lineage


def _tree(*links: tuple[int, int]) -> Lineage[str]:
    lineage: Lineage[str] = Lineage()
    for a, b in links:
        lineage.add(a)
        lineage.add(b)
        lineage.link(a, b, f"{a}>{b}")
    return lineage


def test_a_path_says_which_links_are_taken_back() -> None:
    lineage = _tree((0, 1), (1, 2), (1, 5), (5, 6))
    assert lineage.path(2, 6) == [
        Hop(2, 1, "1>2", reverse=True),
        Hop(1, 5, "1>5", reverse=False),
        Hop(5, 6, "5>6", reverse=False),
    ]
    assert lineage.path(6, 0) == [
        Hop(6, 5, "5>6", reverse=True),
        Hop(5, 1, "1>5", reverse=True),
        Hop(1, 0, "0>1", reverse=True),
    ]
    assert lineage.path(5, 5) == []


def test_without_a_connection_there_is_no_path() -> None:
    lineage = _tree((0, 1), (3, 4))
    assert lineage.path(0, 4) is None
    assert lineage.path(0, 9) is None
    assert lineage.path(9, 0) is None
    assert lineage.path(9, 9) is None
    lineage.link(1, 3, "1>3")
    assert [hop.to for hop in lineage.path(4, 0) or ()] == [3, 1, 0]


def test_a_second_way_between_two_versions_is_refused() -> None:
    lineage = _tree((0, 1), (1, 2))
    with pytest.raises(ValueError, match="0 and 2"):
        lineage.link(0, 2, "0>2")
    with pytest.raises(ValueError, match="1 and 1"):
        lineage.link(1, 1, "1>1")
    with pytest.raises(ValueError, match="2 and 3"):
        lineage.link(2, 3, "2>3")
    assert sorted(lineage.payloads) == ["0>1", "1>2"]
    assert lineage.versions == (0, 1, 2)


def test_adding_a_version_again_keeps_its_links() -> None:
    lineage = _tree((0, 1))
    lineage.add(0)
    assert [hop.to for hop in lineage.path(0, 1) or ()] == [1]


def test_a_version_between_kept_ones_is_a_way_point_until_it_is_a_leaf() -> None:
    lineage = _tree((0, 1), (1, 2), (2, 3), (3, 4))
    dropped = lineage.prune({1, 3})
    assert (dropped.versions, sorted(dropped.payloads)) == ({0, 4}, ["0>1", "3>4"])
    assert lineage.versions == (1, 2, 3)
    dropped = lineage.prune({3})
    assert (dropped.versions, sorted(dropped.payloads)) == ({1, 2}, ["1>2", "2>3"])
    assert lineage.versions == (3,)
    assert lineage.prune({3}).versions == frozenset()
    assert lineage.prune(()).versions == {3}
    assert not len(lineage)


def test_a_cut_separates_and_the_other_tree_can_be_dropped() -> None:
    lineage = _tree((0, 1), (1, 2), (2, 3))
    assert lineage.cut(2, 1) == "1>2"
    assert lineage.path(0, 3) is None
    assert [hop.to for hop in lineage.path(3, 2) or ()] == [2]
    dropped = lineage.keep_tree_of(1)
    assert (dropped.versions, dropped.payloads) == ({2, 3}, ("2>3",))
    assert lineage.versions == (0, 1)
    with pytest.raises(KeyError):
        lineage.cut(0, 3)
    assert lineage.keep_tree_of(7).versions == {0, 1}


_trees = st.lists(st.integers(0, 10**6), min_size=1, max_size=25).map(
    lambda picks: [(pick % (i + 1), i + 1) for i, pick in enumerate(picks)]
)
"""Random trees: version i + 1 hangs on an earlier one."""


@settings(deadline=None)
@given(_trees, st.sets(st.integers(0, 25)))
def test_pruning_keeps_all_paths_between_what_is_kept_and_nothing_superfluous(links, keep) -> None:
    lineage = _tree(*links)
    keep &= set(lineage.versions)
    before = {(a, b): lineage.path(a, b) for a in keep for b in keep}
    on_a_path = {hop.to for hops in before.values() for hop in hops or ()} | keep
    dropped = lineage.prune(keep)
    assert {(a, b): lineage.path(a, b) for a in keep for b in keep} == before
    assert set(lineage.versions) == on_a_path
    assert dropped.versions.isdisjoint(lineage.versions)
    every = [f"{a}>{b}" for a, b in links]
    assert sorted([*dropped.payloads, *lineage.payloads]) == sorted(every)


@settings(deadline=None)
@given(_trees, st.randoms(use_true_random=False))
def test_a_path_is_the_reverse_of_the_path_back(links, random) -> None:
    lineage = _tree(*links)
    a, b = random.choice(lineage.versions), random.choice(lineage.versions)
    there, back = lineage.path(a, b), lineage.path(b, a)
    assert there is not None
    assert back == [Hop(h.to, h.frm, h.payload, not h.reverse) for h in reversed(there)]
    assert [h.frm for h in there] + [b] == [a] + [h.to for h in there]
