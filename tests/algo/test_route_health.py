import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shared.algo.ewma_control import ASYNC, AnchorState, advance
from shared.algo.route_health import (
    Decisions,
    decision_differences,
    ewma_health,
    noise_floor,
    route_error,
    snapshot_health,
)


def test_the_error_of_a_route_by_hand():
    exact = torch.tensor([-1.0, -2.0, -3.0])
    scalars, arrays = route_error(
        exact + torch.tensor([0.0, 0.2, -0.4]), exact, torch.tensor([0, 2, 2]), num_ages=4
    )
    assert scalars == pytest.approx(
        {"error_mean": 0.2, "error_max": 0.4, "error_p99": 0.396, "error_bias": -0.2 / 3},
        rel=1e-5,
    )
    assert arrays["age_count"].tolist() == [1, 0, 2, 0]
    assert arrays["age_error_sum"].tolist() == pytest.approx([0, 0, 0.6, 0])
    assert arrays["age_bias_sum"].tolist() == pytest.approx([0, 0, -0.2, 0])
    none = torch.zeros(0)
    assert route_error(none, none, none.long())[0] == {}


def flags(text: str) -> torch.Tensor:
    return torch.tensor([c == "1" for c in text])


def test_wrong_decisions_by_hand():
    exact = Decisions(rejected_N=flags("11000000"), cut_N=flags("00110000"))
    route = Decisions(rejected_N=flags("10100000"), cut_N=flags("01100100"))
    assert decision_differences(exact, route) == pytest.approx(
        {
            "wrongly_rejected": 1 / 8,
            "wrongly_kept": 1 / 8,
            "wrongly_cut": 1 / 8,
            "wrongly_uncut": 1 / 8,
            "wrong_any": 4 / 8,
        }
    )


@given(st.text("01", min_size=1, max_size=12), st.data())
def test_a_route_never_differs_from_itself(rejected: str, data: st.DataObject):
    cut = data.draw(st.text("01", min_size=len(rejected), max_size=len(rejected)))
    same = Decisions(flags(rejected), flags(cut))
    assert set(decision_differences(same, same).values()) == {0.0}


def test_no_tokens_differ_in_nothing():
    none = Decisions(flags(""), flags(""))
    assert decision_differences(none, none) == {}


def test_the_noise_floor_is_that_of_fresh_tokens_alone():
    log_s = torch.tensor([0.001, -0.002, 0.9])
    assert noise_floor(log_s, torch.tensor([0, 0, 3])) == pytest.approx(0.00199)
    assert noise_floor(log_s, torch.tensor([1, 1, 3])) is None


def test_an_anchor_in_numbers():
    decision = advance(
        AnchorState(age=2.0, age_square=4.0),
        ASYNC,
        target_age=2.0,
        discontinuities=("step_rollback",),
    )
    assert ewma_health(decision) == {
        "ewma_age": 0.0,
        "ewma_target_age": 2.0,
        "ewma_age_deficit": 2.0,
        "ewma_age_std": 0.0,
        "ewma_keep": 0.0,
        "ewma_worse_steps": 0.0,
        "ewma_resets_discontinuity": 1.0,
    }


def test_snapshots_in_numbers():
    assert snapshot_health(3, 1, resident_bytes=7) == {
        "snapshot_loads": 3.0,
        "snapshot_misses": 1.0,
        "snapshot_hit_ratio": 0.75,
        "snapshot_resident_bytes": 7.0,
    }
    assert snapshot_health(0, 0, resident_bytes=0)["snapshot_hit_ratio"] == 1.0
