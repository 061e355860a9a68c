"""`lagwise explain` under every route and under objectives that couple tokens."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from services.learner.items import build_items, pack_items
from shared.algo.policy_loss import PolicyLoss, count
from shared.cli import explain
from shared.cli.explain_config import configuration
from shared.cli.explain_records import joined
from shared.cli.records import load
from shared.wire.base import Array
from shared.wire.journal import Batch, Member, TrainedGroup
from shared.wire.trajectory import RoutingRecord, SamplingParams
from tests.cli.explain_world import configure, crafted, pick, sampled, sampled_at, under
from tests.cli.synthetic_run import Spec, SyntheticRun, build


@pytest.fixture
def run() -> SyntheticRun:
    return build(Spec(versions=4))


def stale(b: Batch, g: TrainedGroup, m: Member) -> bool:
    return g.issue_version < b.version - 1 and m.advantage != 0


def explained_by(
    run: SyntheticRun, tmp_path: Path, route: str
) -> tuple[Batch, Member, explain.Explained]:
    """Explain a stale member; the run has no scores, as under a route that stores none."""
    batch, _, member = pick(run, stale)
    run.scores.clear()
    algo = {"corrections": []} if route == "rollout" else {}  # a mask on D = 1 is refused
    run_dir = configure(
        run.write(tmp_path / "run"), old_logprobs={"route": route}, learner={"algo": algo}
    )
    return batch, member, explain.run(run_dir, member.ticket_id)


def test_rollout_takes_the_samplers(run: SyntheticRun, tmp_path: Path) -> None:
    _, _, explained = explained_by(run, tmp_path, "rollout")
    assert explained.old_source == "sampler"
    for token in sampled(explained):
        assert token.d == 1
        assert token.log_s == pytest.approx(token.current - token.sampler, abs=1e-9)
        assert token.status == "approximate"
        assert token.in_loss
        assert np.isfinite(token.gradient)


def test_current_recompute_has_no_staleness(run: SyntheticRun, tmp_path: Path) -> None:
    batch, member, explained = explained_by(run, tmp_path, "current_recompute")
    values = under(run, batch.version, member)
    assert explained.old_source == "recomputed"
    for token in sampled(explained):
        assert token.s == 1
        assert token.old == pytest.approx(values[token.position], abs=1e-9)


def test_snapshot_old_isjoined_again_under_its_own_version(
    run: SyntheticRun, tmp_path: Path
) -> None:
    _, _, member = pick(run, stale)
    stored = run.scores[member.score_seq].sequences[0].old_logprobs.numpy()
    _, _, explained = explained_by(run, tmp_path, "snapshot_old")
    assert explained.old_source == "recomputed"
    assert any("snapshot_old stores them after the step" in note for note in explained.notes)
    for token in sampled(explained):
        assert token.old == pytest.approx(float(stored[token.position]), abs=1e-6)
        assert token.status == "exact"
    assert {t.age for t in sampled(explained)} != {0}


def test_what_no_forward_repeats_is_unverified_as_in_the_step(
    run: SyntheticRun, tmp_path: Path
) -> None:
    """Drawn from a truncated distribution; the same holds for experts that were not recorded."""
    _, _, member = pick(run, stale)
    terminal = run.terminals[member.terminal_seq]
    sequence = terminal.outcome.sequences[0]
    cut = SamplingParams(top_k=3)
    turns = tuple(turn.model_copy(update={"sampling": cut}) for turn in sequence.turns)
    outcome = terminal.outcome.model_copy(
        update={"sequences": (sequence.model_copy(update={"turns": turns}),)}
    )
    run.terminals[member.terminal_seq] = terminal.model_copy(update={"outcome": outcome})
    _, _, explained = explained_by(run, tmp_path, "snapshot_old")
    assert {token.status for token in sampled(explained)} == {"unverified"}


def test_routing_of_another_model_is_a_note_and_no_crash(run: SyntheticRun, tmp_path: Path) -> None:
    _, _, member = pick(run, stale)
    terminal = run.terminals[member.terminal_seq]
    sequence = terminal.outcome.sequences[0]
    experts = Array.of(np.zeros((1, 1, 1), dtype=np.uint8), "u1")
    record = RoutingRecord(version=sequence.spans[0].version, start=0, stop=1, experts=experts)
    sequences = (sequence.model_copy(update={"routing": (record,)}),)
    outcome = terminal.outcome.model_copy(update={"sequences": sequences})
    run.terminals[member.terminal_seq] = terminal.model_copy(update={"outcome": outcome})
    explained = explain.run(run.write(tmp_path / "run"), member.ticket_id)
    assert any("sequence 0 is not of this model: routing of 1 layers" in n for n in explained.notes)
    assert all(np.isnan(token.current) for token in sampled(explained))


def test_the_interpolated_proxy_is_the_losses_own(run: SyntheticRun, tmp_path: Path) -> None:
    _, _, explained = explained_by(run, tmp_path, "interp_prox_loglinear")
    assert explained.old_source == "interpolated"
    for token in sampled(explained):
        assert token.age is not None
        alpha = max(0.0, (token.age - 1) / token.age) if token.age else 0.0
        log_rho = token.current - token.sampler
        assert token.log_d == pytest.approx(alpha * log_rho, abs=1e-6)
        assert token.log_s == pytest.approx((1 - alpha) * log_rho, abs=1e-6)
        assert token.old == pytest.approx(token.sampler + alpha * log_rho, abs=1e-6)


@pytest.mark.parametrize("route", ["ewma_prox", "ppo_ewma_async"])
def test_an_average_of_the_weights_is_moved_as_the_reports_say(
    run: SyntheticRun, tmp_path: Path, route: str
) -> None:
    keeps = {1: 1.0, 2: 0.5, 3: 0.25, 4: 0.75}
    run.steps = [
        s.model_copy(update={"scalars": {**s.scalars, "ewma_keep": keeps[s.version]}})
        for s in run.steps
    ]
    batch, member, explained = explained_by(run, tmp_path, route)
    anchor = run.weights[0]
    for version in range(1, batch.version + 1):
        keep = keeps[version + 1]
        theta = run.weights[version]
        anchor = {n: (keep * w + (1 - keep) * theta[n]).astype("f4") for n, w in anchor.items()}
    run.weights[99] = anchor
    values = under(run, 99, member)
    for token in sampled(explained):
        assert token.old == pytest.approx(values[token.position], abs=1e-5)


def test_an_average_without_reports_is_unknown_and_said_so(
    run: SyntheticRun, tmp_path: Path
) -> None:
    _, _, explained = explained_by(run, tmp_path, "ewma_prox")
    assert explained.old_source == "unknown"
    assert any("reports no ewma_keep" in note for note in explained.notes)
    assert all(np.isnan(t.old) and np.isnan(t.gradient) for t in sampled(explained))
    assert all(np.isfinite(t.current) for t in sampled(explained))


ALGOS: list[dict[str, Any]] = [
    {},
    {"aggregation": "token_sum_constant", "horizon": 200.0, "entropy_bonus": 0.02},
    {"aggregation": "seq_mean_token_mean", "objective": {"kind": "gspo", "low": 0.5, "high": 0.5}},
    {"objective": {"kind": "cispo"}, "corrections": [{"kind": "tis"}]},
    {"objective": {"kind": "m2po", "threshold": 0.001}},
    {"corrections": [{"kind": "tis"}, {"kind": "self_normalise"}]},
    {"objective": {"kind": "topr"}},
]


class Forward:
    """A forward whose log-probs are a leaf."""

    entropy_T = None

    def __init__(self, logprobs_T: torch.Tensor) -> None:
        self.logprobs_T = logprobs_T


@pytest.mark.parametrize("algo", ALGOS, ids=str)
def test_gradients_are_those_of_the_whole_step_packed_at_once(
    run: SyntheticRun, tmp_path: Path, algo: dict[str, Any]
) -> None:
    batch, _, member = pick(run, stale)
    crafted(run, member, batch.version, [1.0, 3.0, 0.6], [1.4, 0.9, 1.1])
    run_dir = configure(run.write(tmp_path / "run"), learner={"algo": algo})
    explained = explain.run(run_dir, member.ticket_id)

    records = load(run_dir)
    config, _ = configuration(records, batch)
    assert config is not None
    members = {m.ticket_id: joined(records, m) for g in batch.groups for m in g.members}
    items = build_items(batch, members, {t: m.scores for t, m in members.items()}).items
    in_loss = [m for g in batch.groups if not g.no_loss for m in g.members]
    packed = pack_items(items)
    now_T = torch.from_numpy(np.concatenate([under(run, batch.version, m) for m in in_loss]))
    objective = replace(config.learner.algo.settings(), entropy_bonus=0.0)
    loss = PolicyLoss(objective)
    mean = loss.weight_mean([packed])
    value, _ = loss.compute(
        Forward(now_T.requires_grad_()),
        packed,
        count([packed], objective.horizon),
        version_now=batch.version,
        weight_mean=mean,
    )
    value.backward()
    assert now_T.grad is not None
    own = packed.split(now_T.grad)[in_loss.index(member)].numpy()
    where = sampled_at(run, member)
    found = [t.gradient_step for t in sampled(explained)]
    assert found == pytest.approx(own[where].tolist(), rel=1e-9, abs=1e-15)
    assert any(found)


def test_a_later_minibatch_is_marked_and_divides_by_its_own_count(
    run: SyntheticRun, tmp_path: Path
) -> None:
    batch, _, _ = pick(run, stale)
    members = [m for g in batch.groups if not g.no_loss for m in g.members]
    run_dir = configure(run.write(tmp_path / "run"), learner={"optimizer": {"minibatches": 2}})
    found = [explain.run(run_dir, m.ticket_id) for m in members]
    places = [explained.places[0] for explained in found]
    assert {place.minibatch for place in places if place} == {0, 1}
    counts = {place.minibatch: place.num_tokens for place in places if place}
    assert sum(counts.values()) == sum(len(sampled_at(run, m)) for m in members)
    for explained, place in zip(found, places, strict=True):
        assert place is not None
        late = any("after 1 optimizer step(s) inside the step" in n for n in explained.notes)
        assert late == (place.minibatch == 1)
        for token in sampled(explained):
            assert token.gradient_step == pytest.approx(token.gradient / place.num_tokens)


def test_the_kl_term_is_in_the_gradient_with_its_reference_recomputed(
    run: SyntheticRun, tmp_path: Path
) -> None:
    _, _, member = pick(run, stale)
    run_dir = configure(
        run.write(tmp_path / "run"),
        learner={"algo": {"kl": {"coefficient": 0.5, "estimator": "k2"}}},
    )
    with_kl = explain.run(run_dir, member.ticket_id)
    configure(run_dir, learner={"algo": {}})
    without = explain.run(run_dir, member.ticket_id)
    base = under(run, 0, member)
    assert any("KL term, its reference recomputed under v0" in n for n in with_kl.notes)
    for token, plain in zip(sampled(with_kl), sampled(without), strict=True):
        k2 = 0.5 * (token.current - base[token.position])
        assert token.gradient - plain.gradient == pytest.approx(k2, abs=1e-6)
