"""Trajectories that the model cannot have produced cost their tickets, not the learner."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from shared.runtime.memory_server import MemoryServer
from shared.wire.base import Array
from shared.wire.journal import Batch
from shared.wire.trajectory import RoutingRecord, Sequence, Trajectory
from tests.learner import make
from tests.learner.crash_world import NUM_VERSIONS, config_for, journal_of, learn, players


def with_routing(sequence: Sequence) -> Sequence:
    record = RoutingRecord(version=0, start=0, stop=2, experts=Array.of([[[0, 1]]] * 2, "u1"))
    return sequence.model_copy(update={"routing": (record,)})


def with_a_token_beyond_the_vocabulary(sequence: Sequence) -> Sequence:
    ids = sequence.token_ids.numpy().copy()
    ids[1] = 99
    return sequence.model_copy(update={"token_ids": Array.of(ids, "i4")})


@pytest.mark.parametrize("spoil", [with_routing, with_a_token_beyond_the_vocabulary])
@pytest.mark.parametrize("route", ["oracle", "current_recompute"])
async def test_what_the_model_cannot_have_sampled_fails_its_ticket_and_training_goes_on(
    spoil: Callable[[Sequence], Sequence],
    route: str,
    model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls, usual = itertools.count(), make.trajectory

    def played(reward: float, versions: tuple[int, ...]) -> Trajectory:
        one = usual(reward, versions)
        if next(calls) % 5:
            return one
        return one.model_copy(update={"sequences": tuple(map(spoil, one.sequences))})

    monkeypatch.setattr(make, "trajectory", played)
    server = MemoryServer()
    async with players(server):
        assert not await learn(server, config_for(model_dir, tmp_path, route), "first", None)
    batches = [e.body for e in await journal_of(server) if isinstance(e.body, Batch)]
    assert [batch.version for batch in batches] == list(range(NUM_VERSIONS))
    groups = [group for batch in batches for group in batch.groups]
    assert sum(len(group.failed) for group in groups) > 0
    trained = [member.terminal_seq for group in groups for member in group.members]
    assert len(trained) == sum(3 - len(group.failed) for group in groups)
    assert np.all(np.bincount(trained) <= 1)
