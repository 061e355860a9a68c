"""The learner dies around every kind of append; its successor neither loses nor repeats."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from services.learner.config import OptimizerSection
from shared.runtime.errors import Fatal
from shared.runtime.memory_server import MemoryServer
from shared.wire.journal import Batch, Disposed, Issued, RunFinished
from tests.learner.crash_world import (
    NUM_VERSIONS,
    config_for,
    digests_of,
    journal_of,
    learn,
    players,
)

ROUTES = (
    "snapshot_old", "ewma_prox", "ppo_ewma_async", "interp_prox_loglinear", "interp_prox_linear",
    "current_recompute", "rollout",
)  # fmt: skip


@pytest.mark.parametrize("route", ROUTES)
async def test_a_learner_killed_on_any_route_derives_the_same_bytes_again(
    route: str, model_dir: Path, tmp_path: Path
) -> None:
    """Whatever a route carries from step to step must come back with the checkpoint."""
    server, config = MemoryServer(), config_for(model_dir, tmp_path, route)
    async with players(server):
        assert await learn(server, config, "first", ("manifest", 4, "after"))
        before = await digests_of(server)
        assert not await learn(server, config, "second", None)
    after = await digests_of(server)
    assert {v: after[v] for v in before} == before
    assert len(set(after.values())) == NUM_VERSIONS + 1


CRASHES = [
    (kind, nth, when)
    for kind, nth in (
        ("run_started", 1), ("manifest", 1), ("issued", 1), ("ticket", 3), ("evaluated", 1),
        ("batch", 1), ("batch", 4), ("manifest", 3), ("manifest", 5), ("stats", 3), ("chunk", 3),
        ("run_finished", 1),
    )
    for when in ("before", "after")
]  # fmt: skip


@pytest.mark.parametrize("crash_at", CRASHES, ids=lambda c: "-".join(map(str, c)))
async def test_a_learner_killed_anywhere_is_continued_without_loss_or_repetition(
    crash_at: tuple[str, int, str],
    model_dir: Path,
    tmp_path: Path,
) -> None:
    server, config = MemoryServer(), config_for(model_dir, tmp_path)
    async with players(server):
        assert await learn(server, config, "first", crash_at)
        before = await digests_of(server)
        assert not await learn(server, config, "second", None)
    after = await digests_of(server)
    assert {v: after[v] for v in before} == before, "a committed version changed its bytes"
    assert len(set(after.values())) == NUM_VERSIONS + 1, "every step must change the weights"

    entries = [e.body for e in await journal_of(server)]
    issued = [t.ticket_id for b in entries if isinstance(b, Issued) for t in b.tickets
              if t.purpose == "train"]  # fmt: skip
    batches = [b for b in entries if isinstance(b, Batch)]
    trained = [m.ticket_id for b in batches for g in b.groups for m in g.members]
    assert [b.version for b in batches] == list(range(NUM_VERSIONS))
    assert max(Counter(issued).values()) == 1
    assert max(Counter(trained).values()) == 1
    [finished] = [b for b in entries if isinstance(b, RunFinished)]
    assert set(issued) == set(trained) | set(finished.unfinished)


async def test_replay_that_gives_other_bytes_is_refused(model_dir: Path, tmp_path: Path) -> None:
    server, config = MemoryServer(), config_for(model_dir, tmp_path)
    async with players(server):
        assert await learn(server, config, "first", ("manifest", 2, "after"))
        other = config.learner.model_copy(
            update={"optimizer": OptimizerSection(lr=2e-2, minibatches=2)}
        )
        with pytest.raises(Fatal, match="other bytes than the committed"):
            await learn(server, config.model_copy(update={"learner": other}), "second", None)


@pytest.mark.parametrize("on_stale", ["drop", "mask"])
async def test_without_hold_stale_groups_are_dropped_or_masked_and_accounted_for(
    on_stale: str, model_dir: Path, tmp_path: Path
) -> None:
    server, config = MemoryServer(), config_for(model_dir, tmp_path)
    admission = config.admission.model_copy(update={"on_stale": on_stale, "max_staleness": 1})
    async with players(server, laggard="1"):
        assert not await learn(
            server, config.model_copy(update={"admission": admission}), "first", None
        )
    entries = [e.body for e in await journal_of(server)]
    groups = [g for b in entries if isinstance(b, Batch) for g in b.groups]
    trained = {m.ticket_id for g in groups for m in g.members}
    dropped = {t for b in entries if isinstance(b, Disposed) for t in b.ticket_ids}
    issued = {t.ticket_id for b in entries if isinstance(b, Issued) for t in b.tickets
              if t.purpose == "train"}  # fmt: skip
    [finished] = [b for b in entries if isinstance(b, RunFinished)]
    assert issued == trained | dropped | set(finished.unfinished)
    masked = [g.group_id for g in groups if g.masked_versions]
    if on_stale == "drop":
        assert dropped
        assert not masked
    else:
        assert not dropped
        assert masked
        assert all(group_id.endswith("1") for group_id in masked)
