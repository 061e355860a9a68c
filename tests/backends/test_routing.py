"""Routing records become rows: by version for ℓ^old, by what came first for ℓ."""

from __future__ import annotations

import numpy as np
import pytest

from shared.backends.expert_layers import ExpertLayers, replayed
from shared.backends.routing import NOT_RECORDED, not_recorded, routing_rows
from shared.wire.base import Array
from shared.wire.trajectory import RoutingRecord, recorded_stop


def record(version: int, start: int, experts: list[int], dtype="u1") -> RoutingRecord:
    """One layer, one choice."""
    return RoutingRecord(
        version=version,
        start=start,
        stop=start + len(experts),
        experts=Array.of(np.array(experts)[:, None, None], dtype),
    )


def column(rows) -> list[int]:
    return rows[:, 0, 0].tolist()


RECORDS = (record(3, 0, [10, 11, 12]), record(3, 3, [13]), record(4, 0, [20, 21, 22, 23, 24]))
"""Version 3 sampled two turns; version 4 forwarded everything again and went on."""


def test_a_version_is_replayed_with_what_it_recorded_itself():
    assert column(routing_rows(RECORDS, 4, 3)) == [10, 11, 12, 13]
    assert column(routing_rows(RECORDS, 5, 4)) == [20, 21, 22, 23, 24]


def test_the_present_policy_is_replayed_with_what_was_recorded_first():
    assert column(routing_rows(RECORDS, 5)) == [10, 11, 12, 13, 24]


def test_the_first_record_of_a_token_counts():
    again = (*RECORDS, record(3, 0, [90, 91, 92, 93, 94]))
    assert column(routing_rows(again, 5, 3)) == [10, 11, 12, 13, 94]


def test_what_lies_beyond_is_cut_and_what_is_missing_is_left_to_the_router():
    assert column(routing_rows(RECORDS, 2, 3)) == [10, 11]
    rows = routing_rows(RECORDS, 6, 3)
    assert column(rows) == [10, 11, 12, 13, NOT_RECORDED, NOT_RECORDED]


def test_a_version_is_recorded_up_to_its_first_gap():
    assert [recorded_stop(RECORDS, version) for version in (3, 4, 7)] == [4, 5, 0]
    later = (record(3, 6, [1]), record(3, 1, [1, 1, 1, 1]))
    assert recorded_stop((*RECORDS, *later), 3) == 5
    assert recorded_stop(later, 3) == 0


def test_without_records_there_is_nothing_to_replay():
    assert routing_rows((), 5) is None


@pytest.mark.parametrize(("dtype", "top", "wide"), [("u1", 255, np.int16), ("u2", 65535, np.int32)])
def test_every_expert_id_survives(dtype, top, wide):
    rows = routing_rows((record(1, 0, [0, top], dtype),), 2)
    assert rows.dtype == wide
    assert column(rows) == [0, top]
    assert not_recorded(3, rows).dtype == wide
    assert not_recorded(3, rows).shape == (3, 1, 1)


class Model:
    def __init__(self, expert_layers: ExpertLayers | None) -> None:
        self.expert_layers = expert_layers


def test_replaying_needs_a_model_that_has_experts():
    has = ExpertLayers(2, 2, 8)
    assert replayed(Model(has), "replay") == has
    assert replayed(Model(has), "recompute") is None
    assert replayed(Model(None), "recompute") is None
    with pytest.raises(ValueError, match=r"^model\.routing replay: the model has no experts"):
        replayed(Model(None), "replay")
