"""`examples/fixed_async_offpolicy`: every file is a run, and trains two versions over the bus."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from services.learner.routes.registry import ROUTES
from shared.backends.torch_backend import TorchBackend
from shared.cli.config_cmd import check_model_directory, read, validate
from shared.runtime.config import ROLES
from shared.runtime.sections import OldLogprobsSection
from shared.wire.codec import decode
from shared.wire.journal import JournalEntry, RunFinished
from tests.learner.interrupt_world import World

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("one_thread")]

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples/fixed_async_offpolicy"
EXACT = {"oracle", "snapshot_old", "interrupt"}
NEEDED = {
    "rollout": {"learner.algo.corrections": []},
}
"""By route: settings beside `old_logprobs` and the oracle's replicas that it cannot do without."""
VERSIONS = 2
SMALL = {
    "admission": {"groups_per_version": 8, "group_size": 8, "max_outstanding_groups": 16},
    "telemetry": {"lease_interval_s": 0.1, "lease_expiry_s": 0.6},
    "learner": {"versions": VERSIONS, "eval": {"episodes": 0}},
    "env_agents": {
        "concurrency": 24, "heartbeat_s": 0.1, "ack_wait_s": 0.6, "pull_timeout_s": 0.05,
        "backoff_s": 0.01, "backoff_max_s": 0.05, "drain_s": 0.5,
    },
    "rollout": {
        "heartbeat_s": 0.05, "max_running": 6, "kv_slots": 16, "drain_s": 0.5,
        "follow_retry_s": 0.05,
    },
    "logit_oracle": {
        "max_wait_s": 0.02, "drain_s": 0.5, "fetch_timeout_s": 0.05, "control_poll_s": 0.05,
    },
}  # fmt: skip
"""A run of seconds: sizes and waits, nothing of the algorithm."""


@pytest.fixture(scope="module", autouse=True)
def _transformers_are_imported() -> None:
    """Two services load their models in threads of one process: lazy imports do not bear that."""
    TorchBackend(torch.float32).load_hf(ROOT / "examples/frozen_lake/base")


def leaves(tree: dict[str, Any], path: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        inner = isinstance(value, dict)
        found |= leaves(value, f"{path}{key}.") if inner else {f"{path}{key}": value}
    return found


def test_there_is_one_file_per_route() -> None:
    files = {path.stem for path in EXAMPLES.glob("*.yaml")}
    known = set(get_args(OldLogprobsSection.model_fields["route"].annotation))
    assert files == known == set(ROUTES)
    readme = (EXAMPLES / "README.md").read_text()
    assert all(f"| `{route}` |" in readme for route in files)


@pytest.mark.parametrize("route", ROUTES)
def test_a_file_differs_from_the_demo_only_in_what_its_route_needs(route: str) -> None:
    values, demo = read(EXAMPLES / f"{route}.yaml"), read(ROOT / "examples/frozen_lake/values.yaml")
    own, shared = leaves(values.config), leaves(demo.config)
    differing = {
        key: own.get(key) for key in own.keys() | shared if own.get(key) != shared.get(key)
    }
    assert differing.pop("run.name") == f"fixed-async-{route.replace('_', '-')}"
    others = {k: v for k, v in differing.items() if not k.startswith("old_logprobs.")}
    assert others == NEEDED.get(route, {})
    assert values.config["old_logprobs"]["route"] == route
    assert values.replicas == demo.replicas | {"logit_oracle": int(route == "oracle")}
    check_model_directory(values)
    assert set(validate(values)) == set(ROLES)


def small(route: str, run_dir: Path) -> dict[str, Any]:
    tree = read(EXAMPLES / f"{route}.yaml").config
    for section, settings in SMALL.items():
        tree[section] = {**tree.get(section, {}), **settings}
    return tree | {"run": {**tree["run"], "dir": str(run_dir)}}


@pytest.mark.parametrize("route", ROUTES)
async def test_an_example_trains_two_versions_over_the_bus(route: str, tmp_path: Path) -> None:
    replicas = read(EXAMPLES / f"{route}.yaml").replicas
    async with World(tmp_path, VERSIONS) as world:
        world.settings = small(route, tmp_path)
        for role in ROLES:
            for number in range(min(1, replicas[role])):
                world.start(role, f"{role}-{number}")  # type: ignore[arg-type]
        assert not await world.learned()
        reports, batches = await world.reports(), await world.batches()
        states = await world.published(VERSIONS)
        journal = [decode(r.payload, JournalEntry).body for r in await world.records("journal")]
        scores = await world.records("scores")
    assert [report.version for report in reports] == [1, 2]
    assert [batch.version for batch in batches] == [0, 1]
    assert isinstance(journal[-1], RunFinished)
    # a batch in which no group has two outcomes trains nothing
    trained = [report for report in reports if report.scalars["loss_tokens"] > 0]
    assert trained
    exact = 1.0 if route in EXACT else 0.0
    for report in trained:
        assert report.scalars["old_logits_exact_ratio"] == exact
        assert report.scalars["fallback_tokens"] == 0
        assert report.scalars["exact_tokens"] == exact * report.scalars["loss_tokens"]
        assert report.scalars["rej_any"] < 0.5
        before, after = states[report.version - 1], states[report.version]
        assert any(not torch.equal(before[name], after[name]) for name in before)
    assert bool(scores) == (route in EXACT)
    forwarded = [report.scalars["old_logprobs_forward_tokens"] > 0 for report in reports]
    assert all(forwarded) == (route not in {"oracle", "rollout"} and "interp" not in route)
    # up to age 1 an interpolated proxy is the sampler's log-prob itself
    is_sampler = route == "rollout" or "interp" in route
    assert all((r.scalars["d_abs_log_max"] == 0) == is_sampler for r in trained)
