from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.algo.version_scoring import forward_tokens, parts_by_version


@dataclass(frozen=True)
class Stamp:
    version: int
    start: int
    stop: int


def test_a_version_forwards_up_to_its_last_own_token():
    parts = parts_by_version([Stamp(4, 3, 5), Stamp(5, 5, 6), Stamp(4, 9, 11), Stamp(6, 12, 14)])
    assert [(p.version, p.prefix_len, p.positions.tolist()) for p in parts] == [
        (4, 11, [3, 4, 9, 10]),
        (5, 6, [5]),
        (6, 14, [12, 13]),
    ]
    assert forward_tokens(parts) == 11 + 6 + 14


def test_no_stamps_need_no_forward():
    assert parts_by_version([]) == []
    assert forward_tokens([]) == 0


@pytest.mark.parametrize(
    "spans", [[Stamp(0, 2, 2)], [Stamp(0, -1, 2)], [Stamp(0, 0, 3), Stamp(1, 2, 4)]]
)
def test_spans_that_are_empty_negative_or_overlapping_are_refused(spans: list[Stamp]):
    with pytest.raises(ValueError, match="span"):
        parts_by_version(spans)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4), st.integers(0, 3)), max_size=8))
def test_every_stamped_token_is_kept_once_under_its_own_version(layout):
    spans, at = [], 0
    stamps: dict[int, int] = {}
    for version, length, gap in layout:
        spans.append(Stamp(version, at, at + length))
        stamps.update(dict.fromkeys(range(at, at + length), version))
        at += length + gap
    kept: dict[int, int] = {}
    for part in parts_by_version(spans):
        assert part.prefix_len == int(part.positions[-1]) + 1
        assert np.all(np.diff(part.positions) > 0)
        for position in part.positions.tolist():
            assert position not in kept
            kept[position] = part.version
    assert kept == stamps
