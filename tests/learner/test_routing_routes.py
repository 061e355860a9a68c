"""Recorded routing in whole runs: on every exact route a version is scored with its own records."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from shared.algo.batching import pack
from shared.backends.routing import ROUTING
from shared.backends.torch_backend import TorchBackend
from shared.cli.audit_rescoring import query_of
from shared.wire.codec import decode
from shared.wire.journal import TrainedGroup
from shared.wire.messages import Score, Terminal
from shared.wire.trajectory import Sequence, Trajectory
from tests.e2e.upcycled import upcycle
from tests.learner.interrupt_world import BASE, SUBJECTS, World

pytestmark = pytest.mark.timeout(120)
VERSIONS = 4


class Replayed:
    """A fresh model that takes the experts which the audit's own reading of the records gives."""

    def __init__(self, source: Path, states: dict[int, dict[str, torch.Tensor]]) -> None:
        self._states = states
        self._backend = TorchBackend(torch.float64, trains=False)
        self._backend.load_hf(source)

    def logprobs(self, sequence: Sequence, version: int, *, replay: bool = True) -> np.ndarray:
        self._backend.load_state(self._states[version])
        query = query_of(sequence, version, np.arange(1), 1.0)
        per_token = {ROUTING: [query.routing.astype(np.int32)]} if replay else {}
        batch = pack([query.token_ids], per_token)
        return self._backend.score(batch, temperature=1.0).numpy()


async def trained(world: World) -> list[tuple[TrainedGroup, Trajectory, Score]]:
    """Return what was trained, and what stands on the log as its score, whoever stored it."""
    found: list[tuple[TrainedGroup, Trajectory, Score]] = []
    for group in [group for batch in await world.batches() for group in batch.groups]:
        for member in group.members:
            terminal = await world.bus.last(SUBJECTS.terminal(member.ticket_id))
            score = await world.bus.last(SUBJECTS.score(member.ticket_id))
            assert terminal is not None
            assert score is not None
            outcome = decode(terminal.payload, Terminal).outcome
            assert isinstance(outcome, Trajectory)
            found.append((group, outcome, decode(score.payload, Score)))
    return found


@pytest.mark.parametrize("route", ["interrupt", "snapshot_old"])
async def test_every_trained_token_is_scored_with_what_its_version_recorded(
    route: str, tmp_path: Path
) -> None:
    source = tmp_path / "moe"
    upcycle(Path(BASE), source)
    model = {"source": str(source), "routing": "replay"}
    found: Counter[str] = Counter()
    async with World(tmp_path / "run", VERSIONS, model=model) as world:
        world.settings["old_logprobs"]["route"] = route
        world.settings["rollout"]["dtype"] = "bfloat16"  # other ties, other choices
        world.start("learner")
        for pod in ("rollout-0", "rollout-1"):
            world.start("rollout", pod)
        world.start("env_agents")
        assert not await world.learned(110.0)
        reference = Replayed(source, await world.published(VERSIONS))
        for group, trajectory, score in await trained(world):
            for sequence, scores in zip(trajectory.sequences, score.sequences, strict=True):
                old = scores.old_logprobs.numpy()
                found["spanning"] += len({span.version for span in sequence.spans}) > 1
                status = {entry.version: entry.status for entry in scores.versions}
                assert not group.masked_versions
                for span in sequence.spans:
                    assert status[span.version] == "exact"
                    own = slice(span.start, span.stop)
                    replayed = reference.logprobs(sequence, span.version)[own]
                    np.testing.assert_allclose(old[own], replayed, rtol=0, atol=1e-10)
                    chosen = reference.logprobs(sequence, span.version, replay=False)[own]
                    found["told_apart"] += int((np.abs(old[own] - chosen) > 1e-6).sum())
                    found["tokens"] += span.stop - span.start
    assert found["spanning"] or route != "interrupt"
    assert found["told_apart"] > 0.01 * found["tokens"]
