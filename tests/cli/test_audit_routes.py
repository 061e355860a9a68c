"""What the audit checks of runs whose scores no batch points at: snapshots and approximations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from shared.cli import summary
from shared.cli.audit import AuditResult, run, save, table
from shared.cli.ledger import of_run
from shared.cli.records import load
from shared.wire.base import Array
from shared.wire.journal import Batch, RunStarted
from tests.cli.synthetic_run import Spec, SyntheticRun, build

APPROXIMATE = "ppo_ewma_async"
SMALL = {"versions": 4, "groups": 2, "eval_tasks": 6}


def made(route: str) -> SyntheticRun:
    return build(Spec(route=route, **SMALL))


def audited(synthetic: SyntheticRun, run_dir: Path, tokens: int = 200) -> AuditResult:
    return run(synthetic.write(run_dir), tokens=tokens)


def test_an_approximate_run_is_sound_and_says_that_nothing_was_rescored(tmp_path: Path) -> None:
    result = audited(made(APPROXIMATE), tmp_path / "run")
    assert result.ok, result.problems
    assert result.routes == (APPROXIMATE,)
    assert (result.audited_tokens, result.old_logits_exact_ratio) == (0, 0.0)
    assert result.stamp_tokens >= 50
    assert result.stamp_square_error < result.stamp_square_error_before
    assert result.stamp_square_error < result.stamp_square_error_after
    text = table(result)
    assert f"{APPROXIMATE} (approximate: nothing to rescore)" in text
    assert "audit: ok" in text
    save(result, tmp_path / "run")
    facts = summary.write(tmp_path / "run")
    assert facts["sound"]
    assert facts["old_logprobs_routes"] == [APPROXIMATE]
    assert summary.read_audit(tmp_path / "run") == result


def lose_a_ticket(synthetic: SyntheticRun) -> None:
    synthetic.queued.clear()


def train_twice(synthetic: SyntheticRun) -> None:
    first, second = synthetic.batches()[:2]
    again = second.model_copy(update={"groups": (*second.groups, first.groups[0])})
    synthetic.replace(second, again)


def tamper(synthetic: SyntheticRun) -> None:
    seq = synthetic.batches()[0].groups[0].members[0].terminal_seq
    changed = synthetic.terminals[seq].model_copy(update={"producer": "mallory"})
    synthetic.terminals[seq] = changed


def too_old(synthetic: SyntheticRun) -> None:
    last = synthetic.batches()[-1]
    synthetic.replace(last, last.model_copy(update={"version": last.version + 9}))


def shift_weights(synthetic: SyntheticRun, by: int) -> None:
    """The archive's version v is what sampled v - by: every stamp is off by one."""
    known = dict(synthetic.weights)
    first, last = min(known), max(known)
    for version in known:
        synthetic.weights[version] = known[min(last, max(first, version + by))]


INJECTED: list[tuple[Callable[[SyntheticRun], None], str]] = [
    (lose_a_ticket, "a ticket is lost: 1"),
    (train_twice, "a ticket was trained more than once"),
    (tamper, "trained on a terminal of another ticket or content"),
    (too_old, "token age outside 0..4"),
    (lambda s: shift_weights(s, 1), "fit the version before the stamped one"),
    (lambda s: shift_weights(s, -1), "fit the version after the stamped one"),
]


@pytest.mark.parametrize(
    ("inject", "line"),
    INJECTED,
    ids=["loss", "duplicate", "terminal", "age", "stamps late", "stamps early"],
)
def test_what_is_wrong_with_an_approximate_run_is_seen(
    inject: Callable[[SyntheticRun], None], line: str, tmp_path: Path
) -> None:
    synthetic = made(APPROXIMATE)
    inject(synthetic)
    result = audited(synthetic, tmp_path / "run")
    assert any(line in problem for problem in result.problems), result.problems


def test_snapshot_scores_are_found_by_ticket_and_rescored(tmp_path: Path) -> None:
    result = audited(made("snapshot_old"), tmp_path / "run")
    assert result.ok, result.problems
    assert result.audited_tokens >= 200
    assert (result.mismatches, result.stamp_tokens) == (0, 0)
    assert result.old_logits_exact_ratio == 1.0
    assert result.control_ratio > 0.9


def test_a_snapshot_score_that_is_gone_wrong_or_of_another_terminal_is_seen(
    tmp_path: Path,
) -> None:
    synthetic = made("snapshot_old")
    member = next(g for b in synthetic.batches() for g in b.groups if not g.no_loss).members[0]
    seq = next(s for s, score in synthetic.scores.items() if score.ticket_id == member.ticket_id)
    score, kept = synthetic.scores[seq], dict(synthetic.scores)
    del synthetic.scores[seq]
    problems = audited(synthetic, tmp_path / "gone").problems
    assert any("score that is not in the log: 1" in line for line in problems)

    synthetic.scores = kept
    off = np.array(score.sequences[0].old_logprobs.numpy())
    off[off != 0] += 1e-3
    [sequence] = score.sequences
    changed = sequence.model_copy(update={"old_logprobs": Array.of(off, "f4")})
    synthetic.scores[seq] = score.model_copy(update={"sequences": (changed,)})
    result = audited(synthetic, tmp_path / "wrong", tokens=1_000_000)
    assert result.mismatches > 0

    synthetic.scores[seq] = score.model_copy(update={"terminal_digest": "0" * 32})
    problems = audited(synthetic, tmp_path / "other").problems
    assert any("the score of another terminal" in line for line in problems)


def test_what_a_snapshot_score_does_not_claim_is_not_held_against_it(tmp_path: Path) -> None:
    """Tokens trained on the fallback: recorded as approximate, not exact, not audited."""
    synthetic = made("snapshot_old")
    for seq, score in synthetic.scores.items():
        [sequence] = score.sequences
        values = np.array(sequence.old_logprobs.numpy())
        claims = tuple(
            c.model_copy(update={"status": "approximate"}) if c.version == 1 else c
            for c in sequence.versions
        )
        spans = synthetic.terminals[score.terminal_seq].outcome.sequences[0].spans
        for span in (s for s in spans if s.version == 1):
            values[span.start : span.stop] += 0.5
        changed = sequence.model_copy(
            update={"versions": claims, "old_logprobs": Array.of(values, "f4")}
        )
        synthetic.scores[seq] = score.model_copy(update={"sequences": (changed,)})
    result = audited(synthetic, tmp_path / "run", tokens=1_000_000)
    assert result.ok, result.problems
    assert result.old_logits_exact_ratio < 1
    # control: an oracle has no such excuse
    synthetic.replace(
        next(b for b in synthetic.journal if isinstance(b, RunStarted)),
        RunStarted(incarnation="i1", seed=0, model_digest="d0"),
    )
    problems = audited(synthetic, tmp_path / "oracle").problems
    assert any("score that is not in the log" in line for line in problems)


def test_a_batch_is_held_to_the_route_of_the_process_that_journalled_it(tmp_path: Path) -> None:
    synthetic = made(APPROXIMATE)
    second = synthetic.batches()[2]
    at = synthetic.journal.index(second)
    synthetic.journal.insert(at, RunStarted(incarnation="i2", seed=0, model_digest="d0"))
    synthetic.write(tmp_path / "run")
    ledger = of_run(load(tmp_path / "run"))
    assert list(ledger.routes.values()) == [APPROXIMATE, APPROXIMATE, "oracle", "oracle"]
    assert any("score that is not in the log" in line for line in ledger.problems)
    assert all(isinstance(batch, Batch) for batch in ledger.lineage)
