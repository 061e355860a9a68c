"""The report's table of evaluations."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from shared.cli.report_evaluations import table
from shared.wire.journal import Evaluated


def records(samples: int, *bodies: object) -> Any:
    values = {"learner.eval.samples": samples}
    return SimpleNamespace(
        journal=[(0.0, body) for body in bodies],
        setting=lambda key, default: values.get(key, default),
    )


def test_every_evaluation_is_a_row_with_avg_and_pass_at_k() -> None:
    base = Evaluated(
        version=0,
        name="base",
        task_indices=(0, 0, 1, 1),
        rewards=(1.0, 0.0, 0.0, 0.0),
        num_failed=2,
    )
    final = Evaluated(version=9, name="final", task_indices=(0, 0), rewards=(1.0, 1.0))
    shown = table(records(2, base, final))
    assert shown is not None
    assert "<th>avg@2</th><th>pass@2</th><th>pass^2</th>" in shown
    assert "<td>base</td><td>v0</td><td>2</td><td>0.250 [" in shown
    assert "<td>0.500 [" in shown
    assert "<td>final</td><td>v9</td><td>1</td><td>1.000 [1.000, 1.000]</td>" in shown


def test_the_lift_is_a_row_paired_by_task_with_its_intervals() -> None:
    tasks = tuple(i for i in range(6) for _ in range(2))
    base = Evaluated(version=0, name="base", task_indices=tasks, rewards=(0.0,) * 12)
    final = Evaluated(version=9, name="final", task_indices=tasks, rewards=(1.0, 0.0) * 6)
    shown = table(records(2, base, final))
    assert shown is not None
    assert (
        "<td>lift, paired</td><td></td><td>6</td>"
        "<td>+0.500 [+0.500, +0.500]</td><td>+1.000 [+1.000, +1.000]</td>" in shown
    )
    assert "lift" not in str(table(records(2, base)))


def test_without_evaluations_there_is_no_table() -> None:
    assert table(records(1)) is None
