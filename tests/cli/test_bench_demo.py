"""The aggregate criteria over seeds."""

import pytest

from shared.cli.bench_demo import aggregate, header, judge, line

GOOD = {
    "seed": 0, "success_base": 0.11, "success_final": 0.72, "success_lift_ci": [0.5, 0.7],
    "staleness_max": 4, "staleness_bound": 4, "wall_s": 99.0, "trajectories_lost": 0,
    "trajectories_duplicated": 0, "audit_mismatches": 0, "ok": True,
}  # fmt: skip


def ten(*changed: dict) -> list[dict]:
    rows = [GOOD | {"seed": seed} for seed in range(10)]
    for seed, change in enumerate(changed):
        rows[seed] |= change
    return rows


def test_ten_good_seeds_pass() -> None:
    assert judge(ten()) == []
    assert aggregate(ten())["success_final_mean"] == pytest.approx(0.72)


def test_one_seed_of_ten_may_miss_the_mark_two_may_not() -> None:
    miss = {"success_final": 0.55}
    assert judge(ten(miss)) == []
    assert judge(ten(miss, miss)) == ["8 of 10 seeds went from <= 0.15 to >= 0.6"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"success_final": 0.30}, "collapsed to 0.300"),
        ({"success_final": None, "error": "exit code 1"}, "did not end (exit code 1)"),
        ({"staleness_max": 5}, "staleness 5 is not in 1..4"),
        ({"staleness_max": 0}, "staleness 0 is not in 1..4"),
        ({"trajectories_lost": 1}, "trajectories_lost is 1"),
        ({"trajectories_duplicated": 2}, "trajectories_duplicated is 2"),
        ({"audit_mismatches": None}, "audit_mismatches is None"),
    ],
)
def test_one_bad_seed_is_named(change: dict, said: str) -> None:
    problems = judge(ten(change))
    assert any(problem.startswith("seed 0: ") and said in problem for problem in problems)


def test_a_low_mean_is_named() -> None:
    rows = ten(*[{"success_final": 0.62}] * 10)
    assert judge(rows) == ["mean success 0.620 is below 0.68"]


def test_lines_of_the_table_fit_its_header() -> None:
    assert len(line(GOOD)) <= len(header()) + 2
    assert "did not end" in line({"seed": 3, "error": "exit code 2"})
