"""The `interrupt` route on a MemoryBus: exact without an oracle and without a history."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.learner.interrupt_world import SUBJECTS, Killed, Process, Reference, World

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
        for sequence, scores, span in parts if reference.moved(version) else []:
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


def die_at(process: Process, operation: str, subject: str, nth: int) -> None:
    """Kill -9 the process at its n-th operation on a kind of subject."""
    seen = 0

    def before(did: str, on: str) -> None:
        nonlocal seen
        if did == operation and on.removeprefix(SUBJECTS.prefix + ".").startswith(subject):
            seen += 1
            if seen == nth:
                process.bus.dead = True
                raise Killed

    process.bus.before = before


async def sound(world: World) -> dict[str, int]:
    """Exact, every version once, no ticket twice."""
    batches = await world.batches()
    assert [batch.version for batch in batches] == list(range(VERSIONS))
    trained = [m.ticket_id for b in batches for g in b.groups for m in g.members]
    assert max(Counter(trained).values()) == 1
    return await check_exact(world)


DEATHS = [
    ("put", "control", 4), ("was_put", "control", 4),
    ("append", "partial.scores", 2), ("appended", "partial.scores", 2),
    ("append", "score", 9), ("appended", "score", 12),
    ("append", "journal", 6), ("appended", "journal", 6),
    ("append", "manifest", 3), ("appended", "manifest", 3), ("append", "stats", 3),
]  # fmt: skip


@pytest.mark.parametrize("death", DEATHS, ids=lambda d: "-".join(map(str, d)))
async def test_a_learner_killed_around_a_fence_goes_on_with_the_same_numbers(
    death: tuple[str, str, int], tmp_path: Path
) -> None:
    async with World(tmp_path, VERSIONS) as world:
        first = world.start("learner")
        die_at(first, *death)
        world.start("rollout")
        world.start("env_agents")
        assert await world.learned()
        await world.restart("learner-0")
        assert not await world.learned()
        found = await sound(world)
    assert found["tokens"]
    assert found.get("masked", 0) == 0


async def test_an_env_agent_killed_at_a_fence_is_excluded_and_its_tickets_are_played_again(
    tmp_path: Path,
) -> None:
    async with World(tmp_path, VERSIONS) as world:
        learner = world.start("learner")
        world.start("rollout")
        world.start("env_agents")
        die_at(world.start("env_agents", "env_agents-1"), "append", "partial.tokens", 2)
        assert not await world.learned()
        await sound(world)
        reports = await world.reports()
    assert sum(r.scalars["fence_excluded"] for r in reports) == 1
    assert learner.context.counters["fence_excluded"] == 1
    assert max(r.scalars["fence_s"] for r in reports) >= 0.3, "its lease had to run out"


async def test_an_env_agent_that_joins_and_one_that_is_replaced_lose_nothing(
    tmp_path: Path,
) -> None:
    async with World(tmp_path, VERSIONS) as world:
        learner = world.start("learner")
        world.start("rollout")
        world.start("env_agents")
        due = asyncio.Event()
        puts = 0

        def before(did: str, on: str) -> None:
            nonlocal puts
            puts += did == "was_put" and on == "control"
            if puts == 3:
                due.set()

        learner.bus.before = before
        await due.wait()
        world.start("env_agents", "env_agents-1")
        await world.restart("env_agents-0")
        assert not await world.learned()
        found = await sound(world)
    assert found.get("masked", 0) == 0


async def test_a_rollout_killed_at_a_fence_costs_its_turns_only(tmp_path: Path) -> None:
    async with World(tmp_path, VERSIONS) as world:
        world.start("learner")
        world.start("rollout", "rollout-1")
        world.start("env_agents")
        doomed = world.start("rollout", "rollout-2")
        replies = 0

        def before(did: str, on: str) -> None:
            nonlocal replies
            replies += did == "publish" and "_INBOX" in on
            if replies == 60:
                doomed.bus.dead = True

        doomed.bus.before = before
        assert not await world.learned()
        assert doomed.bus.dead
        found = await sound(world)
    assert found.get("masked", 0) == 0


async def test_what_a_live_env_agent_does_not_hand_in_is_masked_and_counted(
    tmp_path: Path,
) -> None:
    """One of another configuration samples on and acknowledges nothing: no token is guessed."""
    changes = {"old_logprobs": {"fence_timeout_s": 0.2}}
    async with World(tmp_path, VERSIONS, **changes) as world:
        learner = world.start("learner")
        world.start("rollout")
        world.start("env_agents")
        deaf = world.start("env_agents", "env_agents-1", old_logprobs={"route": "oracle"})
        append = deaf.bus.append

        async def late(subject: str, payload: bytes, **options: Any) -> int:
            await asyncio.sleep(0.8)
            return await append(subject, payload, **options)

        deaf.bus.append = late  # type: ignore[method-assign]
        assert not await world.learned()
        found = await sound(world)
        reports = {report.version: report.scalars for report in await world.reports()}
        trained = await world.trained()
    kept, wanted = Counter[int](), Counter[int]()
    for batch, group, _member, trajectory, _score in trained:
        for span in (s for sequence in trajectory.sequences for s in sequence.spans):
            tokens = 0 if group.no_loss else span.stop - span.start
            wanted[batch.version + 1] += tokens
            kept[batch.version + 1] += tokens * (span.version not in group.masked_versions)
    for version, tokens in wanted.items():
        ratio = kept[version] / tokens if tokens else 1.0
        assert reports[version]["old_logits_exact_ratio"] == pytest.approx(ratio)
    counters = learner.context.counters
    assert counters["fence_silent"] == VERSIONS
    assert counters["fence_unscorable_tokens"] > 0
    assert found["masked"] > 0
