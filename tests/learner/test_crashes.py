"""The learner dies around every kind of append; its successor neither loses nor repeats."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from services.learner.config import (
    CheckpointSection,
    EvalSection,
    LearnerConfig,
    LearnerSection,
    OptimizerSection,
)
from services.learner.service import serve
from shared.runtime.algo_section import AlgoSection
from shared.runtime.context import Context
from shared.runtime.errors import Conflict, Fatal
from shared.runtime.logs import Log
from shared.runtime.memory_bus import MemoryBus
from shared.runtime.memory_server import MemoryServer
from shared.runtime.sections import (
    AdmissionSection,
    ModelSection,
    OldLogprobsSection,
    RunSection,
    TelemetrySection,
)
from shared.wire.base import Array
from shared.wire.codec import content_digest, decode, encode
from shared.wire.journal import Batch, Disposed, Issued, JournalEntry, RunFinished
from shared.wire.messages import Layout, Score, SequenceScore, Terminal, Ticket, VersionScore
from shared.wire.subjects import Subjects
from shared.wire.weights import Manifest

NUM_VERSIONS = 5


class Crash(BaseException):
    """Stands for kill -9: nothing in the process runs after it."""


class CrashingBus(MemoryBus):
    """Dies before or after the n-th append to a kind of subject."""

    crash_at: tuple[str, int, str] | None = None
    seen: Counter[str]

    async def append(self, subject: str, payload: bytes, **options: object) -> int:
        kind = subject.split(".")[2]
        if kind == "journal":
            kind = decode(payload, JournalEntry).body.kind
        self.seen[kind] += 1
        due = self.crash_at is not None and self.crash_at[:2] == (kind, self.seen[kind])
        if due and self.crash_at and self.crash_at[2] == "before":
            raise Crash
        seq = await super().append(subject, payload, **options)  # type: ignore[arg-type]
        if due:
            raise Crash
        return seq


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    config = Qwen3Config(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=64,
    )
    Qwen3ForCausalLM(config).save_pretrained(path)
    return path


def config_for(model_dir: Path, run_dir: Path, route: str = "oracle") -> LearnerConfig:
    return LearnerConfig(
        old_logprobs=OldLogprobsSection(route=route),  # type: ignore[arg-type]
        run=RunSection(name="crash", seed=3, dir=str(run_dir)),
        model=ModelSection(source=str(model_dir)),
        admission=AdmissionSection(groups_per_version=2, group_size=3, max_staleness=2),
        telemetry=TelemetrySection(lease_interval_s=0.2),
        learner=LearnerSection(
            versions=NUM_VERSIONS,
            optimizer=OptimizerSection(lr=1e-2, minibatches=2),
            # the made-up sampler log-probs are far from any model's: a mask on D would take all
            algo=AlgoSection() if route == "oracle" else AlgoSection(corrections=()),
            eval=EvalSection(episodes=4),
            checkpoint=CheckpointSection(every_versions=2, keep=2),
        ),
    )


async def play(bus: MemoryBus, make: ModuleType, laggard: str = "") -> None:
    """Env agent, rollout and oracle in one: plays tickets for ever, scores what it played.

    Groups whose id ends in `laggard` end only when the policy has moved on by three versions, and
    carry the version they were issued at.
    """
    await bus.wait_for_streams(10.0)
    queue = await bus.work_queue("tickets", "env_agents", ack_wait_s=5.0, max_ack_pending=1000)
    while True:
        for job in await queue.next(16, 0.05):
            ticket = decode(job.record.payload, Ticket)
            head = await bus.last(bus.subjects.manifest)
            assert head is not None
            version = decode(head.payload, Manifest).version
            if laggard and ticket.group_id.endswith(laggard) and ticket.purpose == "train":
                if version < min(ticket.issue_version + 3, NUM_VERSIONS - 1):
                    await job.nak(0.01)
                    continue
                version = ticket.issue_version
            played = make.trajectory(float(ticket.member % 2), (version,) * 4)
            terminal = Terminal(
                ticket_id=ticket.ticket_id,
                attempt_id="x",
                purpose=ticket.purpose,
                group_id=ticket.group_id,
                member=ticket.member,
                issue_version=ticket.issue_version,
                producer="env",
                outcome=played,
            )
            payload = encode(terminal)
            with suppress(Conflict):
                seq = await bus.append(
                    bus.subjects.terminal(ticket.ticket_id), payload, expect_last_subject_seq=0
                )
                if ticket.purpose == "train":
                    await bus.append(
                        bus.subjects.score(ticket.ticket_id),
                        encode(score(ticket, seq, payload, version)),
                        expect_last_subject_seq=0,
                    )
            await job.ack()


def score(ticket: Ticket, seq: int, payload: bytes, version: int) -> Score:
    old = Array.of(np.full(6, -1.1), "f4")
    provenance = VersionScore(version=version, status="exact", digest="d")
    return Score(
        ticket_id=ticket.ticket_id,
        terminal_seq=seq,
        terminal_digest=content_digest(payload),
        sequences=(SequenceScore(old_logprobs=old, versions=(provenance,)),),
        layout=Layout(backend="torch", dtype="float32", kind="packed", num_threads=1),
        producer="oracle",
    )


@asynccontextmanager
async def players(server: MemoryServer, make: ModuleType, laggard: str = "") -> AsyncIterator[None]:
    bus = MemoryBus(Subjects("crash"), server)
    task = asyncio.create_task(play(bus, make, laggard))
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def learn(server: MemoryServer, config: LearnerConfig, incarnation: str,
                crash_at: tuple[str, int, str] | None) -> bool:  # fmt: skip
    """Run one learner process; return whether it crashed."""
    bus = CrashingBus(Subjects("crash"), server)
    bus.crash_at, bus.seen = crash_at, Counter()
    context = Context("learner", "learner-0", incarnation, bus, Log("learner"))
    crashed = False
    try:
        async with asyncio.timeout(60):
            await serve(context, config)
    except* Crash:
        crashed = True
    return crashed


async def journal_of(server: MemoryServer) -> list[JournalEntry]:
    bus = MemoryBus(Subjects("crash"), server)
    end = (await bus.stream_state("journal")).last_seq
    records = [await bus.get("journal", seq) for seq in range(1, end + 1)]
    return [decode(r.payload, JournalEntry) for r in records if r]


async def digests_of(server: MemoryServer) -> dict[int, str]:
    bus = MemoryBus(Subjects("crash"), server)
    end = (await bus.stream_state("manifests")).last_seq
    records = [await bus.get("manifests", seq) for seq in range(1, end + 1)]
    manifests = [decode(r.payload, Manifest) for r in records if r]
    assert [m.version for m in manifests] == list(range(len(manifests)))
    return {m.version: m.digest for m in manifests}


ROUTES = (
    "snapshot_old", "ewma_prox", "ppo_ewma_async", "interp_prox_loglinear", "interp_prox_linear",
    "current_recompute", "rollout",
)  # fmt: skip


@pytest.mark.parametrize("route", ROUTES)
async def test_a_learner_killed_on_any_route_derives_the_same_bytes_again(
    route: str, model_dir: Path, tmp_path: Path, make: ModuleType
) -> None:
    """Whatever a route carries from step to step must come back with the checkpoint."""
    server, config = MemoryServer(), config_for(model_dir, tmp_path, route)
    async with players(server, make):
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
    make: ModuleType,
) -> None:
    server, config = MemoryServer(), config_for(model_dir, tmp_path)
    async with players(server, make):
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


async def test_replay_that_gives_other_bytes_is_refused(
    model_dir: Path, tmp_path: Path, make: ModuleType
) -> None:
    server, config = MemoryServer(), config_for(model_dir, tmp_path)
    async with players(server, make):
        assert await learn(server, config, "first", ("manifest", 2, "after"))
        other = config.learner.model_copy(
            update={"optimizer": OptimizerSection(lr=2e-2, minibatches=2)}
        )
        with pytest.raises(Fatal, match="other bytes than the committed"):
            await learn(server, config.model_copy(update={"learner": other}), "second", None)


@pytest.mark.parametrize("on_stale", ["drop", "mask"])
async def test_without_hold_stale_groups_are_dropped_or_masked_and_accounted_for(
    on_stale: str, model_dir: Path, tmp_path: Path, make: ModuleType
) -> None:
    server, config = MemoryServer(), config_for(model_dir, tmp_path)
    admission = config.admission.model_copy(update={"on_stale": on_stale, "max_staleness": 1})
    async with players(server, make, laggard="1"):
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
