import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shared.algo import diagnostics
from shared.algo.layout import Layout
from shared.algo.segments import segment_mask, segment_ratio, segment_tis, segments, turns

#           env  A    A    env  A    A    A | env  A
MASK = [0, 1, 1, 0, 1, 1, 1, 0, 1]
VERSIONS = torch.tensor([-1, 2, 2, -1, 2, 3, 3, -1, 3])
LAYOUT = Layout(torch.tensor(MASK).bool(), torch.tensor([0] * 7 + [1] * 2), 2)
LOG_D = torch.tensor([99, 4, 1, 99, 0.5, 2, 8, 99, 3], dtype=torch.float64).log()


def test_a_turn_ends_at_environment_tokens_and_a_segment_at_versions_too():
    assert turns(LAYOUT).run_T.tolist() == [-1, 0, 0, -1, 1, 1, 1, -1, 2]
    assert segments(LAYOUT, VERSIONS).run_T.tolist() == [-1, 0, 0, -1, 1, 2, 2, -1, 3]
    assert segments(LAYOUT, VERSIONS).num_runs == 4


def test_the_segment_ratio_is_the_geometric_mean_by_hand():
    want = [1, 2, 2, 1, 0.5, 4, 4, 1, 3]
    assert segment_ratio(LOG_D, LAYOUT, VERSIONS).tolist() == pytest.approx(want)
    assert segment_tis(LOG_D, LAYOUT, VERSIONS, low=0.75, high=2.5).tolist() == pytest.approx(
        [1, 2, 2, 1, 0.75, 2.5, 2.5, 1, 2.5]
    )
    kept = segment_mask(LOG_D, LAYOUT, VERSIONS, low=0.6, high=3.5)
    assert kept.tolist() == [True, True, True, True, False, False, False, True, True]


def test_without_the_split_at_versions_a_token_of_another_version_decides():
    # one run of 0.5, 2, 8 as in alibaba/ROLL: its mean 2 hides both the 0.5 and the 8
    whole = torch.exp(turns(LAYOUT).mean(LOG_D))
    assert whole[4:7].tolist() == pytest.approx([2, 2, 2])


def test_dropped_environment_tokens_do_not_join_their_neighbours():
    rows = LAYOUT.m_T.nonzero()[:, 0]
    dense = Layout(torch.ones(len(rows)).bool(), LAYOUT.seq_T[rows], 2, index_T=rows)
    want = segment_ratio(LOG_D, LAYOUT, VERSIONS)[rows]
    torch.testing.assert_close(segment_ratio(LOG_D[rows], dense, VERSIONS[rows]), want)
    blind = Layout(dense.m_T, dense.seq_T, 2)
    assert segments(blind, VERSIONS[rows]).num_runs == 3


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 2), st.booleans()), max_size=20))
def test_segments_are_those_the_report_counts(tokens: list[tuple[bool, int, bool]]):
    mask = torch.tensor([m for m, _, _ in tokens], dtype=torch.bool)
    versions = torch.tensor([v for _, v, _ in tokens], dtype=torch.int64)
    starts = torch.tensor([i == 0 or s for i, (_, _, s) in enumerate(tokens)], dtype=torch.bool)
    seq = starts.long().cumsum(0) - 1
    positions = (
        torch.arange(len(tokens)) - torch.cat([starts.nonzero()[:, 0], torch.zeros(1)])[seq]
        if tokens
        else torch.zeros(0)
    )
    layout = Layout(mask, seq, max(1, len(tokens)))
    runs = segments(layout, versions)
    assert runs.num_runs == diagnostics.segments(versions, mask, positions)
    assert runs.num_runs >= turns(layout).num_runs
    # one value per run comes back on exactly its tokens
    spread = runs.spread(torch.arange(runs.num_runs, dtype=torch.float64))
    assert torch.equal(spread[mask].long(), runs.run_T[mask])
    assert not spread[~mask].any()


def test_values_that_are_not_one_per_run_are_refused():
    with pytest.raises(ValueError, match="3 runs"):
        turns(LAYOUT).spread(torch.ones(2))
