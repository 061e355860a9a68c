"""`lagwise explain`: rows against values worked out by hand, and every fate of a ticket."""

import math
from pathlib import Path

import pytest

from shared.cli import explain
from shared.runtime.errors import ConfigError
from shared.wire.journal import Batch, Member, TrainedGroup
from tests.cli.explain_world import configure, crafted, loss_tokens, pick, sampled
from tests.cli.synthetic_run import Spec, SyntheticRun, build


@pytest.fixture
def run() -> SyntheticRun:
    return build(Spec(versions=4))


def test_rows_equal_values_worked_out_by_hand(run: SyntheticRun, tmp_path: Path) -> None:
    """Defaults: IcePop [0.5, 5], veto 1e-4, PPO 0.2 / 0.28, dual 3, token mean."""
    batch, _, up = pick(run, lambda b, g, m: m.advantage > 0)
    _, _, down = pick(run, lambda b, g, m: b is batch and m.advantage < 0)
    d, s = [1.0, 1.0, 1.2, 6.0, 0.4, 1.0], [1.0, 1.5, 1.1, 1.0, 1.0, 0.5]
    crafted(run, up, batch.version, d, s)
    crafted(run, down, batch.version, [1.0, 1.0, 1.0], [0.5, 3.5, 2.0])
    run_dir = run.write(tmp_path / "run")

    first = sampled(explain.run(run_dir, up.ticket_id))
    a = up.advantage
    assert [t.d for t in first[:6]] == pytest.approx(d, rel=1e-5)
    assert [t.s for t in first[:6]] == pytest.approx(s, rel=1e-5)
    assert [t.weight for t in first[:6]] == pytest.approx([1, 1, 1.2, 0, 0, 1], rel=1e-5)
    assert [t.masked for t in first[:6]] == [(), (), (), ("token_high",), ("token_low",), ()]
    assert [t.clipped for t in first[:6]] == [(), ("clip_high",), (), (), (), ()]
    by_hand = [-a, 0.0, -1.2 * 1.1 * a, 0.0, 0.0, -0.5 * a]
    assert [t.gradient for t in first[:6]] == pytest.approx(by_hand, rel=1e-5)
    tokens = loss_tokens(run, batch)
    assert [t.gradient_step for t in first[:6]] == pytest.approx(
        [g / tokens for g in by_hand], rel=1e-5
    )

    second = sampled(explain.run(run_dir, down.ticket_id))
    assert [t.clipped for t in second[:4]] == [("clip_low",), ("dual",), (), ()]
    assert [t.gradient for t in second[:4]] == pytest.approx(
        [0.0, 0.0, -2 * down.advantage, -down.advantage], rel=1e-5
    )
    assert all(t.in_loss and t.status == "exact" for t in first + second)
    assert {t.age for t in first} == {batch.version - t.version for t in first}


def test_a_veto_rejects_every_token_of_its_trajectory(run: SyntheticRun, tmp_path: Path) -> None:
    batch, _, member = pick(run, lambda b, g, m: m.advantage != 0)
    crafted(run, member, batch.version, [1.0, 5e-5], [])
    tokens = sampled(explain.run(run.write(tmp_path / "run"), member.ticket_id))
    assert tokens[0].masked == ("veto",)
    assert tokens[1].masked == ("token_low", "veto")
    assert all("veto" in t.masked and t.gradient == 0 and t.in_loss for t in tokens)


def test_over_age_and_masked_versions_leave_the_loss_by_name(
    run: SyntheticRun, tmp_path: Path
) -> None:
    def two_versions(b: Batch, g: TrainedGroup, m: Member) -> bool:
        spans = run.terminals[m.terminal_seq].outcome.sequences[0].spans
        return {s.version for s in spans} == {b.version, b.version - 1}

    batch, group, member = pick(run, two_versions)
    old_version = batch.version - 1
    masked = group.model_copy(update={"masked_versions": (old_version,)})
    groups = tuple(masked if g is group else g for g in batch.groups)
    run.replace(batch, batch.model_copy(update={"groups": groups}))
    run_dir = run.write(tmp_path / "run")

    tokens = sampled(explain.run(run_dir, member.ticket_id))
    assert {t.masked for t in tokens if t.version == old_version} == {("masked_in_group",)}
    configure(run_dir, admission={"max_staleness": 0})
    tokens = sampled(explain.run(run_dir, member.ticket_id))
    for token in tokens:
        assert token.in_loss == (token.version == batch.version)
        assert token.masked == (() if token.in_loss else ("over_age",))
        assert math.isnan(token.gradient) == (not token.in_loss)
        assert not math.isnan(token.log_d)
    place = explain.run(run_dir, member.ticket_id).places[0]
    outside = sum(
        span.stop - span.start
        for m in group.members
        for span in run.terminals[m.terminal_seq].outcome.sequences[0].spans
        if span.version == old_version
    )
    assert place is not None
    assert place.num_tokens == loss_tokens(run, batch) - outside


def test_an_unscorable_version_is_named_and_has_no_old_log_prob(
    run: SyntheticRun, tmp_path: Path
) -> None:
    batch, group, member = pick(run, lambda b, g, m: b.version > 1)
    score = run.scores[member.score_seq]
    entries = score.sequences[0].versions
    lost = entries[0].model_copy(update={"status": "unscorable"})
    scored = score.sequences[0].model_copy(update={"versions": (lost, *entries[1:])})
    run.scores[member.score_seq] = score.model_copy(update={"sequences": (scored,)})
    masked = group.model_copy(update={"masked_versions": (lost.version,)})
    groups = tuple(masked if g is group else g for g in batch.groups)
    run.replace(batch, batch.model_copy(update={"groups": groups}))
    tokens = sampled(explain.run(run.write(tmp_path / "run"), member.ticket_id))
    gone = [t for t in tokens if t.version == lost.version]
    assert gone
    assert all(t.masked == ("unscorable",) and math.isnan(t.old) for t in gone)


def test_a_group_without_loss_says_why(run: SyntheticRun, tmp_path: Path) -> None:
    group = next(g for b in run.batches() for g in b.groups if g.no_loss)
    explained = explain.run(run.write(tmp_path / "run"), group.members[0].ticket_id)
    assert explained.fate == "trained without loss"
    assert {t.masked for t in sampled(explained)} == {("no_loss:zero_variance",)}
    assert not any(t.in_loss for t in explained.tokens)


def test_every_fate_that_is_no_training_is_told(run: SyntheticRun, tmp_path: Path) -> None:
    by_group = {t.group_id: t.ticket_id for t in run.terminals.values()}
    failed = next(t for t in run.terminals.values() if t.outcome.kind == "failure")
    queued = run.queued[0]
    run_dir = run.write(tmp_path / "run")
    evaluated = explain.run(run_dir, by_group["eval-base-v0"])
    assert evaluated.fate == "evaluated: base"
    assert evaluated.old_source == "archived"
    assert all(t.age is None and math.isnan(t.log_s) for t in sampled(evaluated))
    assert explain.run(run_dir, by_group["g99999"]).fate == "unfinished"
    told = explain.run(run_dir, failed.ticket_id)
    assert (told.fate, told.tokens) == ("failed in a trained group", ())
    assert "env_error (it raised)" in explain.table(told, 120)
    with pytest.raises(ConfigError, match="no terminal yet"):
        explain.run(run_dir, queued)
