"""The `interrupt` route end to end on a MemoryBus: exact without an oracle and without a history."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.learner.interrupt_world import Killed, Reference, World

pytestmark = pytest.mark.timeout(120)
VERSIONS = 5


async def check_exact(world: World, versions: int = VERSIONS) -> dict[str, int]:
    """Hold every old log-prob that entered a loss against a fresh forward of its version."""
    reference = Reference(await world.published(versions))
    wanted: dict[int, list[tuple[Any, Any, Any]]] = {}
    found: Counter[str] = Counter()
    for batch, group, _member, trajectory, score in await world.trained():
        for sequence, scores in zip(trajectory.sequences, score.sequences, strict=True):
            stamps = {span.version for span in sequence.spans}
            found["spanning"] += len(stamps) > 1
            assert max(stamps) <= batch.version
            status = {entry.version: entry.status for entry in scores.versions}
            for span in sequence.spans:
                if span.version in group.masked_versions:
                    found["masked"] += span.stop - span.start
                    continue
                assert status[span.version] == "exact"
                wanted.setdefault(span.version, []).append((sequence, scores, span))
                found["tokens"] += span.stop - span.start
                found["old"] += (span.stop - span.start) * (span.version < batch.version)
    for version, parts in wanted.items():
        for sequence, scores, span in parts:
            ids = sequence.token_ids.numpy()
            old = scores.old_logprobs.numpy()[span.start : span.stop]
            fresh = reference.logprobs(ids, version)[span.start : span.stop]
            np.testing.assert_allclose(old, fresh, rtol=0, atol=1e-10)
    # The control: under the neighbouring version the same comparison must fail.
    for version, parts in wanted.items():
        for sequence, scores, span in parts if version else []:
            ids = sequence.token_ids.numpy()
            old = scores.old_logprobs.numpy()[span.start : span.stop]
            other = reference.logprobs(ids, version - 1)[span.start : span.stop]
            found["told_apart"] += int((np.abs(old - other) > 1e-8).sum())
            found["comparable"] += span.stop - span.start
    assert found["told_apart"] >= 0.9 * found["comparable"]
    return dict(found)


async def test_every_trained_token_has_the_log_prob_of_its_own_version(tmp_path: Path) -> None:
    async with World(tmp_path, VERSIONS) as world:
        world.start("learner")
        world.start("rollout")
        world.start("env_agents")
        assert not await world.learned()
        found = await check_exact(world)
        reports = await world.reports()
    assert found["spanning"], "trajectories span versions"
    assert found["old"], "some tokens are trained when their version is gone"
    assert found.get("masked", 0) == 0
    assert [report.version for report in reports] == list(range(1, VERSIONS + 1))
    for report in reports:
        assert report.scalars["old_logits_exact_ratio"] == 1.0
        assert report.scalars["fence_acknowledged"] == 1.0
        assert report.scalars["fence_unscorable_tokens"] == 0.0
    assert sum(r.scalars["interrupted_turns"] for r in reports) > 0
    assert sum(r.scalars["fence_partial_tokens"] for r in reports) > 0
    print(
        [round(r.scalars["fence_s"] * 1e3, 1) for r in reports],
        [round(r.scalars["fence_score_s"] * 1e3, 1) for r in reports],
        found,
    )
