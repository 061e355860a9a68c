"""The comparison of asynchronous with synchronous runs: the ideal by hand, sides from reports."""

from __future__ import annotations

import pytest

from shared.cli.bench_async import Side, compare, reward_at, side_of
from shared.cli.bench_async_ideal import Engine, full_s, ideal_gain, play_s
from shared.wire.base import Array
from shared.wire.telemetry import StepReport

FLAT = Engine({1: 100.0, 2: 200.0, 4: 400.0}, slots=4)
"""Every slot samples 100 tokens/s, however many are busy."""


def test_equal_lengths_take_as_long_as_one_of_them() -> None:
    assert play_s([100] * 4, FLAT, in_play=4) == pytest.approx(1.0)
    assert play_s([100] * 8, FLAT, in_play=4) == pytest.approx(2.0)


def test_the_longest_is_played_to_its_end_alone() -> None:
    assert play_s([100, 100, 100, 800], FLAT, in_play=4) == pytest.approx(8.0)
    # A place that becomes free is taken by the next.
    assert play_s([100, 100, 400, 400, 200, 100], FLAT, in_play=4) == pytest.approx(4.0)


def test_more_in_play_than_slots_share_them() -> None:
    assert play_s([100] * 8, FLAT, in_play=8) == pytest.approx(2.0)
    # The long one starts at once instead of last: 800 tokens at half speed, then alone.
    assert play_s([100] * 7 + [800], FLAT, in_play=8) == pytest.approx(2.0 + 7.0)
    assert play_s([100] * 7 + [800], FLAT, in_play=4) == pytest.approx(1.0 + 8.0)


def test_latency_of_the_last_episode_is_not_hidden() -> None:
    assert play_s([100] * 4, FLAT, 4, env_latency_s=0.5) == pytest.approx(1.5)


def test_rates_between_measurements_are_interpolated_and_end_at_the_slots() -> None:
    engine = Engine({1: 100.0, 4: 160.0}, slots=4)
    assert engine.rate(2) == pytest.approx(120.0)
    assert engine.rate(50) == 160.0
    assert full_s([320], engine) == pytest.approx(2.0)


def test_the_ideal_gain_is_of_the_slower_of_both_halves() -> None:
    equal = [[100] * 4]
    assert ideal_gain(equal, FLAT, 4, train_s=0.5) == pytest.approx(1.5)
    assert ideal_gain(equal, FLAT, 4, train_s=2.0) == pytest.approx(1.5)
    assert ideal_gain(equal, FLAT, 4, train_s=1.0) == pytest.approx(2.0)
    tail = [[100, 100, 100, 900]]
    assert ideal_gain(tail, FLAT, 4, train_s=0.0) == pytest.approx(9.0 / 3.0)


def report(version: int, begun: float, published: float, lengths: list[int]) -> StepReport:
    return StepReport(
        version=version,
        started_at=begun,
        trained_at=published,
        published_at=published,
        scalars={"reward_mean": version / 10, "staleness_mean": 1.0},
        arrays={"trained_lengths": Array.of(lengths, "i4")},
    )


def test_a_side_counts_from_its_stride_on() -> None:
    reports = [report(v, 10 * v - 3, 10 * v, [v * 100] * 2) for v in range(1, 6)]
    side = side_of(reports, started_at=2.0)
    # Versions 3, 4, 5 in the 30 s since version 2.
    assert side.tokens_per_s == pytest.approx(2 * (300 + 400 + 500) / 30)
    assert side.train_s == pytest.approx(3.0)
    assert reward_at(side, 5.0) == pytest.approx(0.1)
    assert reward_at(side, 16.0) == pytest.approx(0.2)
    with pytest.raises(ValueError, match="3 versions are too few"):
        side_of(reports[:3], started_at=0.0)


def test_rewards_are_compared_at_the_same_time() -> None:
    def side(rate: float, rewards: list[tuple[float, float]]) -> Side:
        return Side(rate, 1.0, [[100] * 4], rewards, 0.0)

    row = compare(
        side(100.0, [(0.0, 0.5), (10.0, 0.6), (20.0, 0.7)]),
        side(150.0, [(0.0, 0.5), (5.0, 0.6), (10.0, 0.9)]),
        FLAT,
        in_play=4,
    )
    assert row["gain"] == pytest.approx(1.5)
    assert row["ideal_gain"] == pytest.approx(2.0)
    assert row["share"] == pytest.approx(0.75)
    assert row["synchronous_reward_per_s"] == pytest.approx(0.01)
    assert row["asynchronous_reward_per_s"] == pytest.approx(0.04)
