"""Shadows in a learner over the bus: they change nothing, survive kills, and fail alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from services.learner.routes.anchored import EwmaProx
from shared.wire.codec import decode
from shared.wire.messages import Score
from tests.learner.shadow_world import SIZE, VERSIONS, ShadowRun, write_model

pytestmark = [pytest.mark.timeout(90), pytest.mark.usefixtures("one_thread")]

APPROXIMATE = (
    "ewma_prox", "ppo_ewma_async", "interp_prox_loglinear", "interp_prox_linear",
    "current_recompute", "rollout",
)  # fmt: skip
ALL = ("snapshot_old", *APPROXIMATE)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def make_run(model_dir: Path, run_dir: Path, route: str, *shadows: str, **more: Any) -> ShadowRun:
    learner = {name: more.pop(name) for name in ("shadow_every",) if name in more}
    section = {"route": route, "shadow": shadows, "shadow_share": more.pop("share", 1.0)}
    return ShadowRun(model_dir, run_dir, section | more.pop("section", {}), learner, **more)


async def finished(run: ShadowRun) -> ShadowRun:
    assert not await run.learn()
    return run


def by_age(run_reports: list[Any], name: str) -> np.ndarray:
    return sum(r.arrays[name].numpy() for r in run_reports if name in r.arrays)  # type: ignore[return-value]


@pytest.mark.parametrize("route", ["oracle", "snapshot_old", "ppo_ewma_async", "rollout"])
async def test_shadows_change_no_byte_of_what_is_trained(
    route: str, model_dir: Path, tmp_path: Path
) -> None:
    alone = await finished(make_run(model_dir, tmp_path / "a", route))
    shadows = [name for name in ALL if name != route]
    watched = await finished(make_run(model_dir, tmp_path / "b", route, *shadows, share=0.5))
    before = await alone.digests()
    assert await watched.digests() == before
    assert len(set(before.values())) == VERSIONS + 1
    assert watched.context.counters.get("shadow_failures", 0) == 0
    # control: what is compared is the whole policy, and another route's differs
    other = await finished(
        make_run(model_dir, tmp_path / "c", "oracle" if route != "oracle" else "rollout")
    )
    assert await other.digests() != before


async def test_every_shadow_reports_its_error_by_age_against_the_exact_route(
    model_dir: Path, tmp_path: Path
) -> None:
    run = await finished(make_run(model_dir, tmp_path, "snapshot_old", *APPROXIMATE))
    reports = await run.reports()
    assert len(reports) == VERSIONS
    for name in APPROXIMATE:
        count = by_age(reports, f"shadow_{name}_age_count")
        error = by_age(reports, f"shadow_{name}_age_error_sum") / np.maximum(count, 1)
        assert (count > 0).all()
        assert (error[1:] > 1e-4).all(), name
        assert reports[-1].scalars[f"shadow_{name}_unanswered"] == 0
        assert 0 <= reports[-1].scalars[f"shadow_{name}_wrong_any"] <= 1
    count = by_age(reports, "shadow_current_recompute_age_count")
    current = by_age(reports, "shadow_current_recompute_age_error_sum") / count
    assert current[0] < 1e-5 < current[1] < current[2]  # the weights it used are θ_v at age 0
    assert (by_age(reports, "age_tokens") == count).all()  # share 1: every loss token
    assert any(r.scalars["shadow_rollout_wrong_any"] > 0 for r in reports)


async def test_an_exact_shadow_is_the_reference_of_an_approximate_run(
    model_dir: Path, tmp_path: Path
) -> None:
    run = await finished(
        make_run(model_dir, tmp_path, "rollout", "current_recompute", "snapshot_old")
    )
    reports = await run.reports()
    count = by_age(reports, "shadow_rollout_age_count")
    rollout = by_age(reports, "shadow_rollout_age_error_sum") / count
    current = by_age(reports, "shadow_current_recompute_age_error_sum") / count
    assert (rollout > 0.1).all()
    assert current[0] < 1e-5 < current[1]
    assert "shadow_snapshot_old_age_error_sum" not in reports[-1].arrays
    exact = reports[-1].arrays["exact_scatter"].numpy()
    assert (np.abs(exact[:, 0]) > 0).any()  # D of the reference, not the trained route's 1
    assert (reports[-1].arrays["scatter"].numpy()[:, 0] == 0).all()


async def test_an_oracle_that_looks_on_is_not_waited_for(model_dir: Path, tmp_path: Path) -> None:
    run = await finished(
        make_run(
            model_dir, tmp_path, "rollout", "oracle", "current_recompute", scored_members=(0, 1)
        )
    )
    reports = await run.reports()
    assert [r.version for r in reports] == list(range(1, VERSIONS + 1))
    scored = by_age(reports, "shadow_current_recompute_age_count").sum()
    trained = by_age(reports, "age_tokens").sum()
    assert 0 < scored < 0.7 * trained  # age sums are those of the first minibatch
    unanswered = reports[-1].scalars["shadow_oracle_unanswered"]
    assert unanswered >= VERSIONS * SIZE  # half of two groups per version
    assert run.context.counters.get("shadow_failures", 0) == 0
    # control: with every score there, and the members that had none counted
    full = await finished(make_run(model_dir, tmp_path / "b", "rollout", "oracle"))
    last = (await full.reports())[-1]
    assert last.scalars["shadow_oracle_unanswered"] < unanswered


@pytest.mark.parametrize("killed_at", [3, 4, 6])
async def test_a_killed_learner_derives_bytes_anchors_and_figures_again(
    killed_at: int, model_dir: Path, tmp_path: Path
) -> None:
    shadows = ("ppo_ewma_async", "ewma_prox", "current_recompute")
    # thresholds of the automatic resets see what is measured: it must be the same again
    whole = await finished(make_run(model_dir, tmp_path / "a", "snapshot_old", *shadows, share=0.5))
    run = make_run(model_dir, tmp_path / "b", "snapshot_old", *shadows, share=0.5)
    assert await run.learn(killed_at)
    await finished(run)
    assert await run.digests() == await whole.digests()
    for name in shadows[:2]:
        for part in ("anchor.safetensors", "anchor.json"):
            at = f"checkpoints/v{VERSIONS:06d}/shadow_{name}/{part}"
            assert (tmp_path / "a" / at).read_bytes() == (tmp_path / "b" / at).read_bytes()
    figures = {r.version: r for r in await whole.reports()}
    for report in await run.reports():
        before = figures[report.version]
        for name in (n for n in before.arrays if n.startswith("shadow_")):
            assert np.array_equal(report.arrays[name].numpy(), before.arrays[name].numpy()), name
        assert (
            report.scalars["shadow_ewma_prox_ewma_age"]
            == (before.scalars["shadow_ewma_prox_ewma_age"])
        )


async def test_what_a_shadow_does_wrong_is_counted_and_stops_nothing(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = await finished(make_run(model_dir, tmp_path / "a", "oracle"))

    def broken(*_args: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(EwmaProx, "_forward", broken)
    run = await finished(
        make_run(model_dir, tmp_path / "b", "oracle", "ewma_prox", "current_recompute")
    )
    assert await run.digests() == await alone.digests()
    assert run.context.counters["shadow_failures"] == VERSIONS
    last = (await run.reports())[-1]
    assert last.scalars["shadow_ewma_prox_unanswered"] == VERSIONS * 2 * SIZE
    assert "shadow_ewma_prox_error_mean" not in last.scalars
    assert last.scalars["shadow_current_recompute_error_mean"] > 0


async def test_a_comparison_that_fails_leaves_the_step_as_it_is(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shared.algo.shadow import ShadowStep

    alone = await finished(make_run(model_dir, tmp_path / "a", "oracle"))

    def broken(*_args: object, **_more: object) -> None:
        raise ValueError("not comparable")

    monkeypatch.setattr(ShadowStep, "observe", broken)
    run = await finished(make_run(model_dir, tmp_path / "b", "oracle", "rollout"))
    assert await run.digests() == await alone.digests()
    assert run.context.counters["shadow_failures"] == VERSIONS


async def test_shadows_are_compared_every_so_many_versions_and_move_at_each(
    model_dir: Path, tmp_path: Path
) -> None:
    run = await finished(
        make_run(model_dir, tmp_path, "oracle", "ewma_prox", "rollout", shadow_every=3)
    )
    reports = {r.version: r for r in await run.reports()}
    compared = [v for v, r in reports.items() if "shadow_rollout_age_count" in r.arrays]
    assert compared == [1, 4]  # stepped from 0 and from 3
    ages = [reports[v].scalars["shadow_ewma_prox_ewma_age"] for v in compared]
    assert ages[0] == 0 < ages[1]


async def test_metrics_carry_the_route_as_their_only_label(model_dir: Path, tmp_path: Path) -> None:
    run = await finished(make_run(model_dir, tmp_path, "oracle", "rollout", "current_recompute"))
    labelled = run.context.labelled
    assert set(labelled["shadow_error_mean", "route"]) == {"rollout", "current_recompute"}
    last = (await run.reports())[-1].scalars
    for route, value in labelled["shadow_wrong_any", "route"].items():
        assert value == last[f"shadow_{route}_wrong_any"]
    assert run.context.measured["step_shadow_trajectories"] == 2 * SIZE


async def test_snapshot_old_puts_the_scores_it_trained_on_to_the_log(
    model_dir: Path, tmp_path: Path
) -> None:
    run = make_run(model_dir, tmp_path, "snapshot_old")
    assert await run.learn(killed_at=4)
    await finished(run)
    scores = [decode(payload, Score) for payload in await run.records("scores")]
    assert len({s.ticket_id for s in scores}) == len(scores) == VERSIONS * 2 * SIZE
    digests = await run.digests()
    for one in scores:
        assert one.producer == "learner-0"
        for claim in (c for s in one.sequences for c in s.versions):
            assert (claim.status, claim.digest) == ("exact", digests[claim.version])
    assert run.context.counters.get("foreign_scores", 0) == 0


# --- objective four_policy: the anchor of the clip beside the exact route
def anchored(model_dir: Path, run_dir: Path, anchor: str) -> ShadowRun:
    kind = "four_policy" if anchor else "ppo"
    algo = {
        "corrections": [{"kind": "icepop", "low": 0.7, "high": 1.4}],
        "objective": {"kind": kind, "low": 0.05, "high": 0.05},
    }
    section = {"route": "oracle", "shadow": (), "anchor": anchor}
    return ShadowRun(model_dir, run_dir, section, {"algo": algo})


async def test_the_anchor_of_the_clip_is_a_policy_of_its_own_and_outlives_a_kill(
    model_dir: Path, tmp_path: Path
) -> None:
    found: dict[str, dict[int, str]] = {}
    for anchor in ("", "current_recompute", "ewma_prox", "ppo_ewma_async"):
        run = await finished(anchored(model_dir, tmp_path / f"of-{anchor}", anchor))
        found[anchor] = await run.digests()
        assert len(found[anchor]) == VERSIONS + 1
    newest = [digests[VERSIONS] for digests in found.values()]
    assert len(set(newest)) == len(newest), "every anchor trains another policy"
    killed = anchored(model_dir, tmp_path / "killed", "ewma_prox")
    assert await killed.learn(killed_at=4)
    assert not await killed.learn()
    assert await killed.digests() == found["ewma_prox"]
