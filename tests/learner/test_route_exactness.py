"""What each route says of mixed-version trajectories, against a forward of its own, in float64."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from services.learner.routes import snapshots
from services.learner.routes.base import OldLogprobs
from services.learner.routes.registry import ROUTES
from services.learner.staging import Scored
from shared.backends.base import Backend
from shared.backends.trajectory_scoring import Piece
from shared.runtime.errors import Fatal
from shared.weights.canary import CanaryResult
from tests.learner.route_trajectories import HEAD, MIXED, Rows, restamp, rows_of, write_model
from tests.learner.route_world import Versions

pytestmark = pytest.mark.usefixtures("one_thread")

TOLERANCE = 1e-10
EXACT = ("oracle", "snapshot_old", "interrupt")
APPROXIMATE = tuple(name for name in ROUTES if name not in EXACT)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
async def world(model_dir: Path) -> Versions:
    world = Versions(model_dir)
    await world.publish()
    return world


# --- agreement
def assert_exact(world: Versions, members: Sequence[Scored], rows: Rows) -> None:
    """Within the tolerance of its own version at every sampled token, and 0 elsewhere."""
    for member in members:
        for sequence, row in zip(member.trajectory.sequences, rows[member.ticket_id], strict=True):
            assert np.abs(row - world.true_row(sequence)).max() <= TOLERANCE


def assert_told_apart(world: Versions, members: Sequence[Scored], rows: Rows) -> None:
    """Every segment is its own version's, and 100 tolerances from any other's."""
    for member in members:
        for sequence, row in zip(member.trajectory.sequences, rows[member.ticket_id], strict=True):
            ids = sequence.token_ids.numpy()
            for span in sequence.spans:
                at = slice(span.start, span.stop)
                errors = [
                    np.abs(row[at] - world.logprobs(ids, v)[at]).max() for v in range(HEAD + 1)
                ]
                assert errors.pop(span.version) <= TOLERANCE
                assert min(errors) >= 100 * TOLERANCE


@pytest.mark.parametrize("layout", ["single", "packed"])
@pytest.mark.parametrize("route", EXACT)
async def test_an_exact_route_gives_every_token_the_number_of_its_own_version_and_no_other(
    world: Versions, route: str, layout: str
) -> None:
    members = world.play()
    old = await world.old(route, members, layout=layout)
    assert_exact(world, members, rows_of(old))
    assert_told_apart(world, members, rows_of(old))
    for member in members:
        [scored], [sequence] = old.by_ticket[member.ticket_id], member.trajectory.sequences
        stamped = sorted({span.version for span in sequence.spans})
        assert [(v.version, v.status) for v in scored.versions] == [(v, "exact") for v in stamped]


async def test_snapshot_and_oracle_are_the_same_bytes_when_every_sequence_is_forwarded_alone(
    world: Versions,
) -> None:
    members = world.play()
    oracle = await world.old("oracle", members, layout="single")
    snapshot = await world.old("snapshot_old", members, layout="single")
    assert dict(snapshot.by_ticket) == dict(oracle.by_ticket)  # numbers and provenance, bit for bit
    packed = rows_of(await world.old("snapshot_old", members, layout="packed"))
    for ticket_id, rows in rows_of(oracle).items():
        for alone, together in zip(rows, packed[ticket_id], strict=True):
            assert np.abs(alone - together).max() <= TOLERANCE


async def test_what_a_snapshot_costs_is_reported(world: Versions) -> None:
    members = world.play()
    old = await world.old("snapshot_old", members)
    wanted = sum(
        max(s.stop for s in q.spans if s.version == v)
        for m in members
        for q in m.trajectory.sequences
        for v in {s.version for s in q.spans}
    )
    one_copy = sum(t.numel() * t.element_size() for t in world.states[0].values())
    assert old.cost.forward_tokens == wanted
    assert 2 * one_copy < old.cost.held_bytes < 2 * one_copy + HEAD * one_copy
    assert old.cost.seconds > 0
    assert (await world.old("oracle", members)).cost.forward_tokens == 0


@pytest.mark.parametrize("route", APPROXIMATE)
async def test_an_approximate_route_is_off_and_says_so(world: Versions, route: str) -> None:
    members = world.play(noise=0.05)
    old = await world.old(route, members)
    with pytest.raises(AssertionError):
        assert_exact(world, members, rows_of(old))
    statuses = {v.status for own in old.by_ticket.values() for s in own for v in s.versions}
    assert statuses == {"approximate"}
    items = world.items(members, old)
    assert items.exact_tokens == 0
    assert items.should_train_tokens == items.sampled_tokens > 0


async def test_the_age_tracking_anchor_is_neither_the_current_weights_nor_the_sampling_ones(
    world: Versions,
) -> None:
    members = world.play()
    current = rows_of(await world.old("current_recompute", members))
    exact = rows_of(await world.old("oracle", members))
    for route in ("ewma_prox", "ppo_ewma_async"):
        anchored = await world.old(route, members)
        error = _mean_error(rows_of(anchored), exact)
        assert 0 < error < _mean_error(current, exact)
        assert anchored.health["ewma_age"] > 0


def _mean_error(found: Rows, wanted: Rows) -> float:
    gaps = [np.abs(a - b)[b != 0] for t in wanted for a, b in zip(found[t], wanted[t], strict=True)]
    return float(np.concatenate(gaps).mean())


# --- mutations: each known mistake, made in the route itself, must fail the check above
Mutation = Callable[[Versions, list[Scored], pytest.MonkeyPatch], Awaitable[OldLogprobs]]


async def off_by_one_stamp(
    world: Versions, members: list[Scored], monkeypatch: pytest.MonkeyPatch
) -> OldLogprobs:
    late = [
        restamp(m, *((min(HEAD, s.version + 1), s.start, s.stop) for s in q.spans))
        for m in members
        for q in m.trajectory.sequences
    ]
    return await world.old("snapshot_old", late)


async def one_wrong_stamp(
    world: Versions, members: list[Scored], monkeypatch: pytest.MonkeyPatch
) -> OldLogprobs:
    first, *rest = members
    return await world.old("snapshot_old", [restamp(first, (0, 4, 9), *MIXED[0][2:]), *rest])


async def snapshot_updated_in_place(
    world: Versions, members: list[Scored], monkeypatch: pytest.MonkeyPatch
) -> OldLogprobs:
    """A history that keeps references to the weights being trained, and a canary that sleeps."""
    monkeypatch.setattr(snapshots, "check_canary", lambda *_: CanaryResult(0.0, True))
    return await _with_aliased_history(world, members)


async def segment_without_its_prefix(
    world: Versions, members: list[Scored], monkeypatch: pytest.MonkeyPatch
) -> OldLogprobs:
    score_pieces = snapshots.score_pieces

    def alone(backend: Backend, pieces: Sequence[Piece], kind: Any) -> list[Any]:
        cut = [
            replace(
                piece,
                token_ids=piece.token_ids[piece.positions[0] - 1 :],
                positions=piece.positions - piece.positions[0] + 1,
            )
            for piece in pieces
        ]
        return score_pieces(backend, cut, kind)

    monkeypatch.setattr(snapshots, "score_pieces", alone)
    return await world.old("snapshot_old", members)


async def wrong_temperature(
    world: Versions, members: list[Scored], monkeypatch: pytest.MonkeyPatch
) -> OldLogprobs:
    return await world.old("snapshot_old", members, temperature=1.0)


async def shifted_alignment(
    world: Versions, members: list[Scored], monkeypatch: pytest.MonkeyPatch
) -> OldLogprobs:
    score_pieces = snapshots.score_pieces

    def shifted(backend: Backend, pieces: Sequence[Piece], kind: Any) -> list[Any]:
        late = [replace(p, positions=p.positions - 1) for p in pieces]
        return score_pieces(backend, late, kind)

    monkeypatch.setattr(snapshots, "score_pieces", shifted)
    return await world.old("snapshot_old", members)


async def current_weights_for_all(
    world: Versions, members: list[Scored], monkeypatch: pytest.MonkeyPatch
) -> OldLogprobs:
    return await world.old("current_recompute", members)


async def _with_aliased_history(world: Versions, members: list[Scored]) -> OldLogprobs:
    async with world.route("snapshot_old") as route:

        @asynccontextmanager
        async def live(_version: int) -> AsyncIterator[Any]:
            yield world.backend.state()

        route._history.at = live
        world.stand_at(HEAD)
        return await route.at_step(members, HEAD)


MUTATIONS = [
    off_by_one_stamp, one_wrong_stamp, snapshot_updated_in_place, segment_without_its_prefix,
    wrong_temperature, shifted_alignment, current_weights_for_all,
]  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS)
async def test_every_known_mistake_is_caught(
    world: Versions, mutation: Mutation, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = world.play()
    rows = rows_of(await mutation(world, members, monkeypatch))
    with pytest.raises(AssertionError):
        assert_exact(world, members, rows)
    with pytest.raises(AssertionError):
        assert_told_apart(world, members, rows)


async def test_an_environment_token_taken_for_a_sampled_one_is_caught(world: Versions) -> None:
    members = world.play()
    *stamps, (version, start, stop) = MIXED[0]
    unmasked = restamp(members[0], *stamps, (version, start, stop + 1))
    old = await world.old("snapshot_old", [unmasked, *members[1:]])
    assert rows_of(old)[members[0].ticket_id][0][stop] != 0
    with pytest.raises(AssertionError):
        assert_exact(world, members, rows_of(old))


async def test_a_snapshot_that_was_updated_in_place_stops_the_run_at_its_canary(
    world: Versions,
) -> None:
    with pytest.raises(Fatal, match="version 0 does not reproduce its canary"):
        await _with_aliased_history(world, world.play())
