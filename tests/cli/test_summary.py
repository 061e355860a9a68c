"""The summary's numbers, and what makes it not ok."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from shared.cli import audit, summary
from shared.cli.archive import ArchiveWriter, Record, archive_dir
from shared.wire.journal import Evaluated
from tests.cli.synthetic_run import Spec, SyntheticRun, build

REQUIRED = [
    "seed",
    "install_s",
    "wall_s",
    "policy_versions",
    "optimizer_steps",
    "tokens_trained",
    "success_base",
    "success_final",
    "success_lift_ci",
    "eval_episodes",
    "staleness_max",
    "staleness_mean",
    "old_logits_exact_ratio",
    "audited_tokens",
    "audit_mismatches",
    "audit_control_mismatches",
    "trajectories_issued",
    "trajectories_trained",
    "trajectories_dropped",
    "trajectories_failed",
    "trajectories_unfinished",
    "trajectories_lost",
    "trajectories_duplicated",
    "restarts",
    "tokens_per_s_generated",
    "tokens_per_s_trained",
    "time_share",
    "peak_memory_bytes",
    "success_lift",
    "ok",
    "problems",
]


@pytest.fixture
def synthetic() -> SyntheticRun:
    return build(Spec(eval_tasks=64))


def evaluated(name: str, rewards: dict[int, float]) -> Evaluated:
    return Evaluated(
        version=0, name=name, task_indices=tuple(rewards), rewards=tuple(rewards.values())
    )


def test_a_sound_run_is_summed_up(synthetic: SyntheticRun, tmp_path: Path) -> None:
    run_dir = synthetic.write(tmp_path / "run")
    audit.save(audit.run(run_dir, tokens=200), run_dir)
    result = summary.write(run_dir)
    assert result == json.loads((run_dir / "summary.json").read_text())
    assert not [name for name in REQUIRED if name not in result]
    assert result["ok"], result["problems"]
    assert result["learned"]
    assert result["policy_versions"] == 7
    assert result["optimizer_steps"] == 12
    assert (result["trajectories_issued"], result["trajectories_trained"]) == (74, 71)
    assert result["restarts"] == 1
    assert result["eval_episodes"] == 64
    assert result["success_final"] - result["success_base"] == pytest.approx(result["success_lift"])
    assert set(result["time_share"]) == {"learner", "rollout", "env_agents", "logit_oracle"}
    assert all(0 < share < 1 for share in result["time_share"].values())
    assert result["tokens_per_s_generated"] > 0
    assert result["oracle_forward_ratio"] >= 1.0
    assert result["audited_tokens"] >= 200
    assert result["audit_mismatches"] == 0
    assert result["audit_control_mismatches"] > 0


def test_the_lift_pairs_by_task_and_its_interval_covers_it() -> None:
    base = {i: float(i % 10 == 0) for i in range(200)}
    final = {i: float(i % 10 != 9) for i in range(20, 260)}
    lift = summary.paired_lift([evaluated("base", base), evaluated("final", final)])
    assert lift is not None
    assert lift.episodes == 180
    assert lift.base == pytest.approx(0.1)
    assert lift.final == pytest.approx(0.9)
    assert lift.lift == pytest.approx(0.8)
    assert lift.low < lift.lift < lift.high
    half_width = 1.96 * np.sqrt(0.16 / 180)
    assert lift.high - lift.low == pytest.approx(2 * half_width, rel=0.1)
    assert lift.learned


def test_pass_at_k_is_paired_over_the_tasks_that_were_played_k_times() -> None:
    def played(name: str, samples: dict[int, tuple[float, ...]]) -> Evaluated:
        pairs = [(index, reward) for index, rewards in samples.items() for reward in rewards]
        indices, rewards = zip(*pairs, strict=True)
        version = 0 if name == "base" else 7
        return Evaluated(version=version, name=name, task_indices=indices, rewards=rewards)  # type: ignore[arg-type]

    base = played("base", {0: (0.0, 0.0), 1: (1.0, 0.0), 2: (0.0, 0.0), 3: (0.0,)})
    final = played("final", {0: (0.0, 1.0), 1: (1.0, 1.0), 2: (0.0, 0.4), 3: (1.0, 1.0)})
    lift = summary.passes_lift([base, final], 2, 1.0)
    assert lift is not None
    assert (lift.episodes, lift.base, lift.final) == (3, pytest.approx(1 / 3), pytest.approx(2 / 3))
    assert lift.lift == pytest.approx(1 / 3)
    assert summary.passes_lift([base, final], 1, 1.0) is None, "pass@1 is success"
    assert summary.passes_lift([base], 2, 1.0) is None


def test_no_interval_above_zero_means_not_learned() -> None:
    few = summary.paired_lift(
        [evaluated("base", {0: 0.0, 1: 1.0, 2: 0.0}), evaluated("final", {0: 1.0, 1: 1.0, 2: 0.0})]
    )
    assert few is not None
    assert few.lift > summary.LEARNED_LIFT
    assert not few.learned


def test_without_two_evaluations_there_is_no_lift(synthetic: SyntheticRun, tmp_path: Path) -> None:
    assert summary.paired_lift([evaluated("base", {0: 1.0})]) is None
    synthetic.journal = [b for b in synthetic.journal if getattr(b, "name", "") != "final"]
    result = summary.write(synthetic.write(tmp_path / "run"))
    assert result["problems"] == ["no base and final evaluation to compare"]
    assert result["sound"]
    assert result["learned"] is None
    assert result["success_lift_ci"] is None


def test_an_evaluation_task_seen_in_training_is_a_problem(
    synthetic: SyntheticRun, tmp_path: Path
) -> None:
    train = next(t for t in synthetic.terminals.values() if t.purpose == "train")
    seq, held_out = next((s, t) for s, t in synthetic.terminals.items() if t.purpose == "eval")
    leaked = held_out.outcome.model_copy(update={"task_digest": train.outcome.task_digest})
    synthetic.terminals[seq] = held_out.model_copy(update={"outcome": leaked})
    result = summary.write(synthetic.write(tmp_path / "run"))
    assert result["problems"] == ["1 evaluation tasks were trained on (equal content)"]
    assert not result["ok"]


def test_an_unreadable_record_is_a_problem(synthetic: SyntheticRun, tmp_path: Path) -> None:
    run_dir = synthetic.write(tmp_path / "run")
    with ArchiveWriter(archive_dir(run_dir)) as writer:
        writer.append("scores", [Record(9999, "s", b"junk", 0.0)])
    result = summary.write(run_dir)
    assert len(result["problems"]) == 1
    assert result["problems"][0].startswith("scores: Malformed")


def test_an_audit_from_before_the_run_went_on_does_not_count(
    synthetic: SyntheticRun, tmp_path: Path
) -> None:
    run_dir = synthetic.write(tmp_path / "run")
    path = audit.save(audit.run(run_dir, tokens=50), run_dir)
    read = summary.read_audit(run_dir)
    assert read is not None
    assert read.as_dict() == json.loads(path.read_text())
    journal = run_dir / "archive" / "journal.bin"
    later = path.stat().st_mtime_ns + 1
    os.utime(journal, ns=(later, later))
    assert summary.read_audit(run_dir) is None
    result = summary.write(run_dir)
    assert (result["audited_tokens"], result["audit_mismatches"]) == (0, None)


def test_a_flat_run_is_sound_but_not_ok(synthetic: SyntheticRun, tmp_path: Path) -> None:
    base = next(b for b in synthetic.journal if getattr(b, "name", "") == "base")
    synthetic.journal = [b for b in synthetic.journal if getattr(b, "name", "") != "final"]
    synthetic.journal.append(base.model_copy(update={"name": "final"}))
    result = summary.write(synthetic.write(tmp_path / "run"))
    assert (result["sound"], result["learned"], result["ok"]) == (True, False, False)
    assert result["problems"][0].startswith("it did not learn: lift +0.000")


def test_restarts_are_read_in_both_forms() -> None:
    assert summary.num_restarts({"restarts": {"rollout": 2, "learner": 1}}) == 3
    assert summary.num_restarts({"restarts": 4}) == 4
    assert summary.num_restarts({}) == 0
