"""The audit agrees with an honest run and sees every kind of wrong old log-prob."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from shared.cli.archive import archive_dir, version_path
from shared.cli.audit import AuditResult, run, save, table
from shared.cli.audit_picks import choose
from shared.cli.audit_rescoring import version_sha256
from shared.cli.ledger import of_run
from shared.cli.records import load
from shared.cli.reference_forward import Query, ReferenceConfig, ReferencePolicy, read_safetensors
from shared.runtime.errors import ConfigError
from shared.weights.digests import sha256_of
from shared.wire.base import Array
from tests.cli.synthetic_run import CONFIG, Spec, SyntheticRun, build


@pytest.fixture(scope="module")
def honest() -> SyntheticRun:
    return build()


@pytest.fixture
def synthetic() -> SyntheticRun:
    return build()


def rewrite_scores(run_: SyntheticRun, value_of: dict[int, np.ndarray]) -> None:
    for seq, values in value_of.items():
        score = run_.scores[seq]
        sequence = score.sequences[0].model_copy(update={"old_logprobs": Array.of(values, "f4")})
        run_.scores[seq] = score.model_copy(update={"sequences": (sequence,)})


def problem(result: AuditResult) -> str:
    assert not result.ok
    return "\n".join(result.problems)


def test_an_honest_run_has_no_mismatch_and_both_controls_do(
    honest: SyntheticRun, tmp_path: Path
) -> None:
    result = run(honest.write(tmp_path / "run"), tokens=300)
    assert result.ok, result.problems
    assert result.audited_tokens >= 300
    assert result.mismatches == 0
    assert result.max_error < 1e-6
    assert result.control_ratio > 0.9
    assert result.sampler_ratio > 0.9
    assert 0 < result.control_tokens < result.audited_tokens  # tokens of v0 have no version before
    assert result.old_logits_exact_ratio == 1.0
    text = table(result)
    assert "audit: ok" in text
    assert f"{result.audited_tokens:,}" in text
    assert json.loads(save(result, tmp_path / "run").read_text())["ok"] is True


def test_the_draw_is_reproducible_and_covers_every_batch(
    honest: SyntheticRun, tmp_path: Path
) -> None:
    run_dir = honest.write(tmp_path / "run")
    assert run(run_dir, tokens=200) == run(run_dir, tokens=200)
    other = run(run_dir, tokens=200, seed=1)
    assert run(run_dir, tokens=200).sampler_median_error != other.sampler_median_error
    records = load(run_dir)
    lineage = of_run(records).lineage
    picks = choose(lineage, records.terminals, tokens=50, rng=np.random.default_rng(3))
    assert {p.batch_version for p in picks} == {b.version for b in lineage}
    assert len({p.member.ticket_id for p in picks}) == len(picks)


def test_a_run_with_fewer_tokens_than_asked_is_audited_whole(
    honest: SyntheticRun, tmp_path: Path
) -> None:
    result = run(honest.write(tmp_path / "run"), tokens=1_000_000)
    in_loss = sum(
        int(honest.terminals[m.terminal_seq].outcome.sequences[0].loss_mask.numpy().sum())
        for batch in honest.batches()
        for group in batch.groups
        if not group.no_loss
        for m in group.members
    )
    assert result.audited_tokens == in_loss
    assert result.ok


def test_old_logprobs_under_the_next_version_are_seen(
    synthetic: SyntheticRun, tmp_path: Path
) -> None:
    """The mutation a wrong stamp or a late weight swap would cause."""
    run_dir = synthetic.write(tmp_path / "a")
    config = ReferenceConfig.of(CONFIG)
    policies = {
        v: ReferencePolicy(config, read_safetensors(version_path(archive_dir(run_dir), v)))
        for v in synthetic.weights
    }
    wrong = {}
    for seq, score in synthetic.scores.items():
        sequence = synthetic.terminals[score.terminal_seq].outcome.sequences[0]
        values = np.array(score.sequences[0].old_logprobs.numpy())
        for span in sequence.spans:
            where = np.arange(span.start, span.stop)
            later = policies[min(span.version + 1, synthetic.spec.versions)]
            values[where] = later.logprobs([Query(sequence.token_ids.numpy(), where)])[0]
        wrong[seq] = values
    rewrite_scores(synthetic, wrong)
    result = run(synthetic.write(tmp_path / "b"), tokens=300)
    assert result.mismatches > 0.9 * result.audited_tokens
    assert "not their version's" in problem(result)


def test_one_wrong_token_in_a_run_audited_whole_is_seen(
    synthetic: SyntheticRun, tmp_path: Path
) -> None:
    group = next(g for b in synthetic.batches() for g in b.groups if not g.no_loss)
    member = group.members[0]
    sequence = synthetic.terminals[member.terminal_seq].outcome.sequences[0]
    values = np.array(synthetic.scores[member.score_seq].sequences[0].old_logprobs.numpy())
    values[sequence.spans[0].start] += 1e-4
    rewrite_scores(synthetic, {member.score_seq: values})
    result = run(synthetic.write(tmp_path / "run"), tokens=1_000_000)
    assert result.mismatches == 1
    assert f"first: {member.ticket_id} under v{sequence.spans[0].version}" in problem(result)


def test_log_probs_shifted_by_one_position_and_nans_are_seen(
    synthetic: SyntheticRun, tmp_path: Path
) -> None:
    shifted = {
        seq: np.roll(s.sequences[0].old_logprobs.numpy(), 1) for seq, s in synthetic.scores.items()
    }
    rewrite_scores(synthetic, shifted)
    result = run(synthetic.write(tmp_path / "a"), tokens=200)
    assert result.mismatches > 0.9 * result.audited_tokens
    rewrite_scores(synthetic, {seq: np.full_like(v, np.nan) for seq, v in shifted.items()})
    result = run(synthetic.write(tmp_path / "b"), tokens=200)
    assert result.mismatches == result.audited_tokens


def test_a_policy_that_never_moved_fails_the_control(tmp_path: Path) -> None:
    result = run(build(Spec(drift=0.0)).write(tmp_path / "run"), tokens=200)
    assert result.mismatches == 0
    assert "control: only 0% of tokens mismatch under the version before" in problem(result)


def test_weights_changed_after_publication_are_refused(
    honest: SyntheticRun, tmp_path: Path
) -> None:
    run_dir = honest.write(tmp_path / "run")
    path = version_path(archive_dir(run_dir), 2)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    assert "version 2: the archived bytes are not its manifest's" in problem(
        run(run_dir, tokens=200)
    )


def test_a_version_that_is_missing_is_named(honest: SyntheticRun, tmp_path: Path) -> None:
    run_dir = honest.write(tmp_path / "run")
    version_path(archive_dir(run_dir), 3).unlink()
    text = problem(run(run_dir, tokens=10_000))
    assert "version 3 cannot be read" in text
    assert "tokens could be audited" in text


def test_problems_of_the_ledger_fail_the_audit(synthetic: SyntheticRun, tmp_path: Path) -> None:
    synthetic.queued.clear()
    assert "a ticket is lost: 1" in problem(run(synthetic.write(tmp_path / "run"), tokens=100))


def test_the_sha256_of_a_version_is_the_publishers(tmp_path: Path) -> None:
    state = {"b": torch.randn(3, 2), "a": torch.randn(5).bfloat16()}
    save_file(state, tmp_path / "w.safetensors")
    assert version_sha256(read_safetensors(tmp_path / "w.safetensors")) == sha256_of(state)


def test_a_folder_that_is_no_run_and_a_lost_model_are_named(
    honest: SyntheticRun, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"no archive/journal\.bin"):
        run(tmp_path)
    run_dir = honest.write(tmp_path / "run")
    (run_dir / "base" / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"no config\.json of the model"):
        run(run_dir)


def test_two_thousand_tokens_take_seconds(tmp_path: Path) -> None:
    run_dir = build(Spec(versions=40, groups=4)).write(tmp_path / "run")
    started = time.process_time()
    result = run(run_dir, tokens=2400)
    assert result.audited_tokens >= 2400
    assert time.process_time() - started < 20
