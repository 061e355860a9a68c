"""What routes on published versions mean for the loss; what happens when a version is missing."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from services.learner.routes import snapshots
from services.learner.routes.registry import ROUTES
from shared.algo.correction_specs import IcePop
from shared.algo.objective import Objective
from shared.algo.objective_specs import Ppo
from shared.runtime.errors import Fatal
from shared.weights.errors import MissingVersion
from tests.learner.route_trajectories import HEAD, MIXED, restamp, rows_of, write_model
from tests.learner.route_world import Versions

pytestmark = pytest.mark.usefixtures("one_thread")

TOLERANCE = 1e-10
EXACT = ("oracle", "snapshot_old", "interrupt")
APPROXIMATE = tuple(name for name in ROUTES if name not in EXACT)
FREE = Objective(corrections=(), objective=Ppo(low=1.0, high=1e9, dual=None))
"""Nothing is masked, truncated or clipped."""
MASKED = Objective(corrections=(IcePop(low=0.9, high=1.1),), objective=Ppo(low=0.2, high=0.2))


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
async def world(model_dir: Path) -> Versions:
    world = Versions(model_dir)
    await world.publish()
    return world


# --- what follows for the loss
async def test_the_discrepancy_is_flat_in_age_under_exact_routes_only(world: Versions) -> None:
    every_age = tuple((v, 4 + 5 * v, 9 + 5 * v) for v in range(HEAD + 1))
    members = world.play([every_age] * 24, noise=0.02)
    by_age = {}
    for route in (*EXACT, "current_recompute"):
        old = await world.old(route, members)
        by_age[route] = world.train(route, members, old, FREE).k3_d_by_age
    for route in EXACT:
        assert by_age[route].max() < 2 * by_age[route].min()
        np.testing.assert_allclose(by_age[route], by_age["oracle"], rtol=1e-6)
    slope = by_age["current_recompute"]
    assert slope[0] == pytest.approx(by_age["oracle"][0], rel=1e-6)  # at age 0 it is exact
    assert np.all(np.diff(slope) > 0)
    assert slope[1] > 10 * by_age["oracle"].max()


async def test_without_masks_and_clips_every_route_has_the_same_gradient(world: Versions) -> None:
    members = world.play(noise=0.1)
    found = {name: await world.old(name, members) for name in ROUTES}
    free = {name: world.train(name, members, old, FREE) for name, old in found.items()}
    exact = free["oracle"]
    assert max(float(g.abs().max()) for g in exact.grads) > 1e-3
    for trained in free.values():
        for own, wanted in zip(trained.grads, exact.grads, strict=True):
            torch.testing.assert_close(own, wanted, rtol=1e-8, atol=1e-10)
    masked = {name: world.train(name, members, old, MASKED) for name, old in found.items()}
    for name in APPROXIMATE:
        assert not _same_grads(masked[name].grads, masked["oracle"].grads), name
    for name in EXACT:
        assert _same_grads(masked[name].grads, masked["oracle"].grads), name


def _same_grads(own: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> bool:
    pairs = zip(own, other, strict=True)
    return all(torch.allclose(a, b, rtol=1e-8, atol=1e-10) for a, b in pairs)


FRESH = tuple(tuple((HEAD, start, stop) for _, start, stop in stamps) for stamps in MIXED)
"""`MIXED` with max_staleness 0."""


async def test_without_staleness_all_routes_that_know_the_discrepancy_have_the_same_loss(
    world: Versions,
) -> None:
    """The anchor of `ewma_prox` has no age logic and stays behind; `ppo_ewma_async` starts over."""
    members = world.play(FRESH, noise=0.1)
    routes = (*EXACT, "current_recompute", "ppo_ewma_async")
    trained = {n: world.train(n, members, await world.old(n, members), MASKED) for n in routes}
    assert 0 < trained["oracle"].scalars["rej_any"] < 1
    for one in trained.values():
        assert one.loss == pytest.approx(trained["oracle"].loss, rel=1e-9)
        assert _same_grads(one.grads, trained["oracle"].grads)
        assert one.scalars["s_max"] == pytest.approx(1.0, abs=1e-9)
        assert one.scalars["clipped_on_arrival"] == 0
    behind = world.train("ewma_prox", members, await world.old("ewma_prox", members), MASKED)
    assert abs(behind.loss - trained["oracle"].loss) > 1e-3


async def test_without_staleness_and_discrepancy_every_route_but_a_late_anchor_is_the_same(
    world: Versions,
) -> None:
    members = world.play(FRESH)
    losses = {}
    for name in ROUTES:
        if name != "ewma_prox":
            trained = world.train(name, members, await world.old(name, members), MASKED)
            assert trained.scalars["rej_any"] == 0
            losses[name] = trained.loss
    # the sampler's log-probs travel as float32
    assert all(loss == pytest.approx(losses["oracle"], abs=1e-6) for loss in losses.values())


# --- a version that is not there
async def test_a_version_on_its_way_is_waited_for(world: Versions) -> None:
    members = world.play([((HEAD, 4, 8), (HEAD - 1, 8, 12))])
    [early] = [restamp(m, (HEAD + 1, 4, 8), (HEAD - 1, 8, 12)) for m in members]
    async with world.route("snapshot_old") as route:
        waiting = asyncio.create_task(route.at_step([early], HEAD + 1))
        await asyncio.sleep(0.1)
        assert not waiting.done()
        await world.publish_next()
        old = await waiting
    ids = early.trajectory.sequences[0].token_ids.numpy()
    wanted = world.logprobs(ids, HEAD + 1)[4:8]
    assert np.abs(rows_of(old)["t0"][0][4:8] - wanted).max() <= TOLERANCE


async def test_a_version_that_does_not_come_stops_the_run_by_name(world: Versions) -> None:
    [member] = [restamp(m, (HEAD + 1, 3, 8)) for m in world.play(MIXED[2:3])]
    async with world.route("snapshot_old", version_timeout_s=0.2) as route:
        with pytest.raises(Fatal, match=rf"version {HEAD + 1} did not arrive within 0.2 s"):
            await route.at_step([member], HEAD)


async def _without_versions_below_2(model_dir: Path) -> Versions:
    world = Versions(model_dir)
    await world.publish(keyframe_every=2)
    assert await world.publisher.purge_below(2) == 2
    return world


async def test_a_version_that_is_gone_stops_the_run_by_name(model_dir: Path) -> None:
    world = await _without_versions_below_2(model_dir)
    members = world.play()
    async with world.route("snapshot_old", version_timeout_s=0.3) as route:
        world.stand_at(HEAD)
        with pytest.raises(Fatal, match=r"version 0 is gone from the bus.* for 0.3 s"):
            await route.at_step(members, HEAD)


async def test_a_route_without_a_way_to_a_version_asks_for_a_keyframe_and_goes_on(
    world: Versions,
) -> None:
    """The newest version's delta is lost: it has no lease that could ask."""
    members = world.play(MIXED[:1])
    async with world.route("oracle") as other:
        assert not other.keyframe_wanted
    manifest = world.publisher.head
    bus, end = world.bus, (await world.bus.stream_state("chunks")).last_seq + 1
    lost = bus.subjects.chunk(manifest.delta.upload_id, 0)
    await bus.purge("chunks", end, subject=lost)
    async with world.route("snapshot_old") as route, asyncio.timeout(20):
        while not route.keyframe_wanted:  # noqa: ASYNC110 - any condition, test code
            await asyncio.sleep(0.02)
        await world.publisher.publish_keyframe(reason="wanted")
        while route.keyframe_wanted:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        world.stand_at(HEAD)
        old = await route.at_step(members, HEAD)
    assert old.fallback_tokens == 0


async def test_a_version_that_comes_back_within_the_bound_is_scored(
    world: Versions, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = world.play(MIXED[:1])
    monkeypatch.setattr(snapshots, "_ASK_AGAIN_S", 0.05)
    async with world.route("snapshot_old") as route:
        asked: list[int] = []

        async def late(version: int, bound_s: float, real: Any = route._follower.ensure) -> None:
            asked.append(version)
            if len(asked) <= 3:
                raise MissingVersion(version, ())
            await real(version, bound_s)

        monkeypatch.setattr(route._follower, "ensure", late)
        world.stand_at(HEAD)
        old = await route.at_step(members, HEAD)
    assert asked[:4] == [0, 0, 0, 0]
    assert old.fallback_tokens == 0
    [row], [sequence] = rows_of(old)["t0"], members[0].trajectory.sequences
    assert np.abs(row - world.true_row(sequence)).max() <= TOLERANCE


async def test_the_fallback_of_an_exact_route_is_tagged_counted_and_never_exact(
    model_dir: Path,
) -> None:
    world = await _without_versions_below_2(model_dir)
    members = world.play(noise=0.05)
    section = {"version_timeout_s": 0.3, "fallback": "current_recompute"}
    old = await world.old("snapshot_old", members, **section)
    current = await world.old("current_recompute", members)
    lost = exact = 0
    for member in members:
        [sequence], [scored] = member.trajectory.sequences, old.by_ticket[member.ticket_id]
        status = {entry.version: entry.status for entry in scored.versions}
        truth = world.true_row(sequence)
        for span in sequence.spans:
            at = slice(span.start, span.stop)
            [substitute] = current.by_ticket[member.ticket_id]
            gone = span.version < 2
            assert status[span.version] == ("approximate" if gone else "exact")
            wanted = substitute.old_logprobs.numpy() if gone else truth
            assert np.abs(scored.old_logprobs.numpy()[at] - wanted[at]).max() <= TOLERANCE
            lost += gone * (span.stop - span.start)
            exact += (not gone) * (span.stop - span.start)
    items = world.items(members, old)
    assert old.fallback_tokens == lost > 0
    assert items.exact_tokens == exact > 0
    assert items.should_train_tokens == lost + exact  # they are trained, and count against it
