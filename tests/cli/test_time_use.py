"""Busy shares and counters from leases."""

import numpy as np
import pytest

from shared.cli.time_use import busy_grid, busy_shares, lives, rate, total
from shared.wire.telemetry import Lease


def lease(pod: str, at: float, busy: float, life: str = "a", role: str = "rollout") -> Lease:
    return Lease(
        role=role, pod=pod, incarnation=life, pid=1, sent_at=at, ready=True, busy_s=busy,
        counters={"sampled_tokens": busy * 10},
    )  # fmt: skip


TWO_LIVES = [
    lease("r0", 100.0, 5.0), lease("r0", 104.0, 8.0), lease("r0", 102.0, 6.0),
    lease("r0", 110.0, 0.0, "b"), lease("r0", 120.0, 5.0, "b"),
    lease("r1", 100.0, 0.0), lease("r1", 120.0, 20.0),
    lease("l0", 100.0, 1.0, role="learner"),
]  # fmt: skip


def test_the_busy_share_is_work_over_wall_time_summed_over_incarnations() -> None:
    shares = busy_shares(lives(TWO_LIVES))
    assert shares["rollout"] == pytest.approx((3 + 5 + 20) / (4 + 10 + 20))
    assert shares["learner"] == 0.0
    assert list(shares) == ["learner", "rollout"]


def test_counters_add_up_over_incarnations_and_spellings() -> None:
    processes = lives(TWO_LIVES)
    assert total(processes, "rollout", "sampled_tokens", "tokens_sampled") == 80 + 50 + 200
    assert rate(processes, "rollout", "sampled_tokens") == pytest.approx(330 / 20)
    assert rate(processes, "learner", "sampled_tokens") == 0.0


def test_a_rate_leaves_out_the_time_before_the_first_and_after_the_last_token() -> None:
    idle = [lease("r0", 0.0, 0.0), lease("r0", 10.0, 0.0), lease("r0", 14.0, 2.0)]
    assert rate(lives([*idle, lease("r0", 99.0, 2.0)]), "rollout", "sampled_tokens") == 5.0


def test_the_grid_has_a_gap_where_a_process_was_dead() -> None:
    grid = busy_grid(lives(TWO_LIVES), 2.0)
    assert grid is not None
    assert grid.pods == ("r0", "r1")
    assert grid.shares[1] == pytest.approx(np.ones(10))
    assert grid.shares[0, :2] == pytest.approx([0.5, 1.0])
    assert np.isnan(grid.shares[0, 2:5]).all()
    assert grid.shares[0, 5:] == pytest.approx(np.full(5, 0.5))


def test_single_leases_give_no_grid() -> None:
    assert busy_grid(lives([lease("r0", 1.0, 1.0)]), 2.0) is None
