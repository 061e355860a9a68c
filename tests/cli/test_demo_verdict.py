"""The last lines of a demo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shared.cli.demo import verdict

SUMMARY: dict[str, Any] = {
    "success_base": 0.088, "success_final": 0.773, "success_lift_ci": [0.645, 0.727],
    "eval_episodes": 512, "eval_samples": 1, "old_logits_exact_ratio": 1.0, "problems": [],
    "ok": True,
}  # fmt: skip


def first_line(**changes: Any) -> str:
    return verdict({**SUMMARY, **changes}, Path("report.html")).splitlines()[0]


def test_one_sample_a_task_is_success() -> None:
    assert first_line() == (
        "success 0.088 -> 0.773 on held-out maps (lift +0.645 to +0.727, 512 episodes)"
    )
    assert "(lift -, 512 episodes)" in first_line(success_lift_ci=None)


def test_several_samples_a_task_are_avg_and_pass_at_k_with_their_intervals() -> None:
    passes = {
        "eval_samples": 4, "eval_episodes": 128, "pass_at_k_base": 0.336,
        "pass_at_k_final": 0.9, "pass_at_k_lift_ci": [0.203, 0.391],
    }  # fmt: skip
    assert first_line(**passes) == (
        "avg@4 0.088 -> 0.773 (lift +0.645 to +0.727), "
        "pass@4 0.336 -> 0.900 (lift +0.203 to +0.391) on 128 held-out tasks"
    )
