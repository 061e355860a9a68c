"""The routes benchmark: one tiny world for every route, what counts as wrong, and the sums."""

from __future__ import annotations

import asyncio
import json
import random
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from shared.cli import bench_routes
from shared.cli import bench_routes_cells as plan
from shared.cli.bench_routes_cells import APPROXIMATE, GRID, METHODS, QUICK, Cell, Setting, cell_of
from shared.cli.bench_routes_confirm import choose, corrected, family
from shared.cli.bench_routes_cost import (
    COST_ROUTES,
    MODELS,
    Assumed,
    cost_size,
    costs,
    extrapolated,
    matched_versions,
)
from shared.cli.bench_routes_episodes import oldest_age, turn_versions
from shared.cli.bench_routes_exact import Ring
from shared.cli.bench_routes_run import Run
from shared.cli.bench_routes_store import Store, run_missing
from shared.cli.bench_routes_world import fake_int4, sampler_state
from shared.runtime.sections import OldLogprobsSection

LR = Setting(lr=3e-3)


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("bases")


@pytest.fixture(scope="module")
def shadowed(bases: Path) -> dict:
    """One run trained with exact log-probs, of which every other route is asked."""
    others = tuple(name for name in COST_ROUTES if name != "oracle")
    cell = Cell("test", "oracle", "mixed8", "int4", 1, LR, shadows=others)
    return asyncio.run(Run(cell, replace(cost_size(QUICK), versions=8), bases).run())


# --- errors against the exact answer
@pytest.mark.parametrize("route", ["oracle", "snapshot_old", "interrupt"])
def test_exact_routes_have_no_error_and_decide_nothing_wrongly(shadowed: dict, route: str) -> None:
    assert shadowed["failure"] == ""
    assert shadowed["errors"][route]["error_max"] <= 1e-5  # one layout's float32 rounding
    assert shadowed["errors"][route]["error_mean"] <= 1e-6
    assert shadowed["errors"][route]["wrong_any"] == 0


@pytest.mark.parametrize("route", APPROXIMATE)
def test_approximate_routes_have_an_error(shadowed: dict, route: str) -> None:
    assert shadowed["errors"][route]["error_mean"] > 1e-3


def test_the_error_of_the_current_weights_grows_with_age_and_is_zero_at_age_zero(
    shadowed: dict,
) -> None:
    by_age = shadowed["by_age"]["current_recompute"]
    counts, sums = np.array(by_age["age_count"]), np.array(by_age["age_error_sum"])
    assert sums[0] <= 1e-5 * max(1.0, counts[0])
    old = counts > 0
    old[0] = False
    assert (sums[old] / counts[old]).min() > 1e-3


def test_trajectories_of_mixed_age_span_versions(shadowed: dict) -> None:
    assert shadowed["steps"]["mixed_version_ratio"] > 0.2


def test_asking_other_routes_does_not_change_the_run(bases: Path) -> None:
    cell = Cell("test", "oracle", "2", "bf16", 1, LR)
    alone = asyncio.run(Run(cell, QUICK, bases).run())
    asked = asyncio.run(Run(replace(cell, shadows=APPROXIMATE), QUICK, bases).run())
    assert alone["trained"] == asked["trained"]
    assert alone["curve"] == asked["curve"]
    assert alone["errors"] == {}


@pytest.mark.parametrize("route", COST_ROUTES)
def test_every_route_trains_a_run_to_its_end(bases: Path, route: str) -> None:
    cell = Cell("test", route, "mixed8", "int4", 1, LR, measured=True)
    result = asyncio.run(Run(cell, replace(QUICK, versions=3), bases).run())
    assert result["failure"] == ""
    assert [version for version, _ in result["curve"]] == [3]
    assert len(result["trained"]) == 3
    assert cell_of(json.loads(json.dumps(result["cell"]))) == cell
    if route in APPROXIMATE:
        assert result["errors"][route]["error_mean"] >= 0


# --- costs
def test_costs_count_the_oracle_where_it_is_not_on_the_path(shadowed: dict) -> None:
    rows = {row["route"]: row for row in costs(shadowed)}
    assert set(rows) == set(COST_ROUTES)
    assert rows["oracle"]["critical_s"] < 1e-3 < rows["oracle"]["extra_cpu_s"]
    assert rows["oracle"]["total_cpu_s"] > rows["rollout"]["total_cpu_s"]
    assert rows["snapshot_old"]["critical_s"] > rows["current_recompute"]["critical_s"]
    assert rows["snapshot_old"]["held_bytes"] > rows["ewma_prox"]["held_bytes"] > 0
    assert rows["interrupt"]["held_bytes"] == 0
    assert 1 <= matched_versions(list(rows.values()), 50) < 50


def test_the_extrapolation_is_the_stated_arithmetic() -> None:
    row = {"route": "snapshot_old", "forward_ratio": 2.0, "loads": 3.0}
    assumed = Assumed(tokens_per_step=1e6, flops=1e15, load_bytes_per_s=1e10, delta_ratio=0.01)
    far = extrapolated(row, MODELS[0], assumed)
    assert far["critical_s"] == pytest.approx(2 * 1e6 * 2 * 4.02e9 / 1e15 + 3 * 8.04e9 / 1e10)
    assert far["gb"] == pytest.approx(8.04 * 1.12)
    assert (far["paper_gb"], far["paper_s"]) == (40.0, 25.0)


# --- the simulated lag, the sampler
def test_a_fixed_lag_is_fixed_and_never_reaches_below_the_first_version() -> None:
    rng = random.Random(0)
    assert turn_versions("4", 10, 50, rng) == (6,) * 10
    assert turn_versions("16", 10, 50, rng) == (0,) * 10


def test_mixed_ages_ascend_and_stay_between_the_oldest_and_the_present() -> None:
    rng = random.Random(0)
    drawn = [turn_versions("mixed8", 30, 50, rng) for _ in range(300)]
    assert all(list(versions) == sorted(versions) for versions in drawn)
    assert {30 - versions[0] for versions in drawn} == set(range(4, 13))
    assert max(versions[-1] for versions in drawn) == 30
    assert oldest_age("mixed8") == 12


def test_the_jump_goes_to_age_zero_and_back() -> None:
    ages = [v - turn_versions("jump", v, 30, random.Random(0))[0] for v in range(30)]
    assert ages == [*range(8), 8, 8, *[0] * 10, *[8] * 10]


def test_int4_has_fifteen_levels_and_touches_projections_only() -> None:
    weight = torch.randn(8, 48, generator=torch.Generator().manual_seed(0))
    rounded = fake_int4(weight)
    for group in (rounded[0, :32], rounded[3, 32:]):
        assert len(group.unique()) <= 15
    assert (rounded - weight).abs().max() <= weight.abs().max() / 14 + 1e-6
    state = {"model.layers.0.mlp.up_proj.weight": weight, "lm_head.weight": weight}
    cast = sampler_state(state, "int4")
    assert not torch.equal(cast["model.layers.0.mlp.up_proj.weight"], weight)
    assert torch.equal(cast["lm_head.weight"], weight)


def test_the_ring_keeps_copies_and_forgets_the_oldest() -> None:
    ring, live = Ring(2), {"w": torch.zeros(2)}
    for version in range(3):
        live["w"].fill_(version)
        ring.put(version, live)
    assert (ring[1]["w"][0], ring[2]["w"][0]) == (1, 2)
    with pytest.raises(KeyError):
        ring[0]


# --- the plan, the choice, the family
def test_the_protocol_and_the_plan_agree() -> None:
    text = Path("docs/routes_protocol.md").read_text()
    assert f"{len(plan.CONFIRM_SEEDS)} seeds, {plan.CONFIRM_SEEDS[0]} to" in text
    assert f"(1000 to {plan.TUNE_SEEDS[-1]})" in text
    assert len(GRID) == 8
    assert {setting.lr for setting in GRID} == {1e-3, 3e-3}
    seeds = [plan.TUNE_SEEDS, plan.ERROR_SEEDS, plan.SWEEP_SEEDS, plan.CONFIRM_SEEDS]
    assert len({seed for of in seeds for seed in of}) == sum(map(len, seeds))
    sweeps = plan.sweep_cells([0])
    assert len({(c.setting.mask, c.setting.clip) for c in sweeps}) >= 12
    assert min(plan.BETAS) == 0.5
    assert max(plan.BETAS) == 0.98


def test_the_routes_of_the_plan_are_the_products() -> None:
    known = OldLogprobsSection.model_json_schema()["properties"]["route"]["enum"]
    assert set(COST_ROUTES) == set(known)


def _row(auc: float, *, final: float = 0.5, collapsed: bool = False, **errors: float) -> dict:
    asked = {
        route: {"error_mean": errors.get(route, 0.1), "wrong_any": errors.get(route, 0.1)}
        for route in APPROXIMATE
    }
    return {"auc": auc, "final": final, "collapsed": collapsed, "errors": asked}


def test_the_best_setting_is_chosen_per_method_and_for_all() -> None:
    cells = plan.tune_cells([0, 1])
    best_of_exact, best_of_others = GRID[3], GRID[5]
    found = {
        cell: _row(
            0.9 if cell.setting == (best_of_exact if cell.route == "oracle" else best_of_others)
            else 0.4
        )
        for cell in cells
    }  # fmt: skip
    chosen = choose(found, complete=len(cells))
    assert chosen is not None
    assert chosen["int4"].tuned["oracle"] == best_of_exact
    assert chosen["bf16"].shared == best_of_others
    tied = choose({cell: _row(0.5) for cell in cells}, complete=len(cells))
    assert tied is not None
    assert tied["int4"].shared == GRID[0]
    assert choose(found, complete=len(cells) + 1) is None


def test_the_family_has_thirty_six_contrasts_and_finds_what_was_put_in() -> None:
    chosen = {
        sampler: plan.Chosen(GRID[0], dict.fromkeys(METHODS, GRID[1])) for sampler in plan.SAMPLERS
    }
    cells = plan.confirm_cells(chosen, 40, range(10_000, 10_030))
    assert len(cells) == 2 * (30 * (1 + 7 + 1) + plan.NUM_SHARED * 7)
    rng = random.Random(0)
    found = {}
    for cell in cells:
        lost = cell.route == "rollout"
        auc = 0.5 + rng.gauss(0, 0.02) - 0.1 * (cell.route == "current_recompute")
        found[cell] = _row(auc, collapsed=lost, current_recompute=0.3 + rng.gauss(0, 0.01))
    contrasts = corrected(family(found))
    assert len(contrasts) == 36
    assert all(one["pairs"] == 30 for one in contrasts)
    wrong = {(c["kind"], c["first"], c["second"]) for c in contrasts if c["verdict"] != "null"}
    assert wrong == {
        ("E", "current_recompute", "ppo_ewma_async"),
        ("E", "current_recompute", "ewma_prox"),
        ("R", "oracle", "current_recompute"),
        ("C", "oracle", "rollout"),
    }


# --- the store and the command
def test_finished_cells_are_not_run_again_and_a_torn_line_is_forgotten(
    tmp_path: Path, monkeypatch
) -> None:
    ran: list[int] = []

    def run_cell(facts: dict, size: dict, bases: str) -> dict:
        ran.append(facts["seed"])
        return {"key": cell_of(facts).key, "cell": facts}

    monkeypatch.setattr("shared.cli.bench_routes_store.run_cell", run_cell)
    path = tmp_path / "cells.jsonl"
    cells = [Cell("a", "oracle", "0", "int4", seed) for seed in range(3)]
    same = replace(cells[0], stage="b", label="shared")
    store = Store(path, QUICK)

    def run(store: Store, wanted: list[Cell], until: float = float("inf")) -> int:
        return run_missing(
            wanted, store, tmp_path, jobs=0, until=until, tell=lambda done, total, row: None
        )

    assert run(store, cells, until=0.0) == 3
    assert run(store, [*cells[:2], same]) == 0
    with path.open("a") as file:
        file.write('{"key": "to')
    assert run(Store(path, QUICK), cells) == 0
    assert ran == [0, 1, 2]
    assert Store(path, plan.Size()).get(cells[0]) is None
    assert asdict(cells[0])["stage"] == "a"


def test_the_command_says_what_is_missing_and_draws_what_is_there(tmp_path: Path, capsys) -> None:
    arguments = ["--quick", "--jobs", "0", "--out", str(tmp_path)]
    assert bench_routes.main([*arguments, "--stage", "confirm"]) == 1
    assert "needs the stages before it" in capsys.readouterr().out
    assert bench_routes.main([*arguments, "--stage", "error"]) == 0
    result = json.loads((tmp_path / "routes.json").read_text())
    assert result["error"]["kind"] == "exploratory"
    assert result["error"]["complete"]
    assert {row["route"] for row in result["error"]["rows"]} == set(METHODS)
    assert "<svg" in (tmp_path / "routes_error_by_lag.svg").read_text()
