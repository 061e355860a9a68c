"""A learner on a MemoryBus among players that make everything up; it dies where it is told to."""

from __future__ import annotations

import asyncio
import random
import zlib
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch

from services.learner.config import (
    CheckpointSection,
    EvalSection,
    LearnerConfig,
    LearnerSection,
    OptimizerSection,
)
from services.learner.service import serve
from shared.cli.archive import STREAMS, ArchiveWriter, archive_dir
from shared.cli.archive import Record as Archived
from shared.runtime.algo_section import AlgoSection
from shared.runtime.bus import Bus, Record, StreamState
from shared.runtime.context import Context
from shared.runtime.errors import Conflict
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
from shared.wire.journal import JournalEntry
from shared.wire.messages import Layout, Score, SequenceScore, Terminal, Ticket, VersionScore
from shared.wire.subjects import StreamName, Subjects
from shared.wire.weights import Keyframe, Manifest
from tests.learner import make

NUM_VERSIONS = 5


class Crash(BaseException):
    """Stands for kill -9: nothing in the process runs after it."""


class CrashingBus(MemoryBus):
    """Dies before or after the n-th append to a kind of subject, or at its n-th call of any."""

    def __init__(
        self, server: MemoryServer, crash_at: tuple[str, int, str] | int | None = None
    ) -> None:
        super().__init__(Subjects("crash"), server)
        self.crash_at = crash_at
        self.seen: Counter[str] = Counter()
        self.died = asyncio.Event()

    async def append(self, subject: str, payload: bytes, **options: object) -> int:
        self._called()
        kind = subject.split(".")[2]
        if kind == "journal":
            kind = decode(payload, JournalEntry).body.kind
        self.seen[kind] += 1
        due = isinstance(self.crash_at, tuple) and self.crash_at[:2] == (kind, self.seen[kind])
        if due and isinstance(self.crash_at, tuple) and self.crash_at[2] == "before":
            self._die()
        seq = await super().append(subject, payload, **options)  # type: ignore[arg-type]
        if due:
            self._die()
        self._called()
        return seq

    async def last(self, subject: str) -> Record | None:
        self._called()
        return await super().last(subject)

    async def get(self, stream: StreamName, seq: int) -> Record | None:
        self._called()
        return await super().get(stream, seq)

    async def stream_state(self, stream: StreamName) -> StreamState:
        self._called()
        return await super().stream_state(stream)

    async def put_control(self, key: str, payload: bytes) -> None:
        self._called()
        await super().put_control(key, payload)
        self._called()

    def _called(self) -> None:
        self.seen["calls"] += 1
        if self.seen["calls"] == self.crash_at or self.died.is_set():
            self._die()

    def _die(self) -> NoReturn:
        self.died.set()
        raise Crash


def save_model(path: Path, seed: int = 0) -> Path:
    """Write a model of one layer and 32 tokens; return its directory."""
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(seed)
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


async def play(bus: Bus, laggard: str = "") -> None:
    """Env agent, rollout and oracle in one: plays tickets for ever, scores what it played.

    Groups whose id ends in `laggard` end only when the policy has moved on by three versions, and
    carry the version they were issued at."""
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
async def players(server: MemoryServer, laggard: str = "") -> AsyncIterator[None]:
    bus = MemoryBus(Subjects("crash"), server)
    task = asyncio.create_task(play(bus, laggard))
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def learn(server: MemoryServer, config: LearnerConfig, incarnation: str,
                crash_at: tuple[str, int, str] | int | None) -> bool:  # fmt: skip
    """Run one learner process; return whether it crashed.

    Each has other global random numbers: nothing that is trained may depend on them.
    """
    seed = zlib.crc32(incarnation.encode())
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    bus = CrashingBus(server, crash_at)
    context = Context("learner", "learner-0", incarnation, bus, Log("learner"))
    serving = asyncio.create_task(serve(context, config))
    dying = asyncio.create_task(bus.died.wait())
    try:
        await asyncio.wait({serving, dying}, timeout=60, return_when=asyncio.FIRST_COMPLETED)
        if not bus.died.is_set():
            assert serving.done()
            await serving
    finally:
        for task in (serving, dying):
            task.cancel()
        await asyncio.wait({serving, dying})
    if bus.died.is_set() and serving.done() and not serving.cancelled():
        serving.exception()  # it is dead: nobody hears what it says
    return bus.died.is_set()


async def journal_of(server: MemoryServer) -> list[JournalEntry]:
    bus = MemoryBus(Subjects("crash"), server)
    end = (await bus.stream_state("journal")).last_seq
    records = [await bus.get("journal", seq) for seq in range(1, end + 1)]
    return [decode(r.payload, JournalEntry) for r in records if r]


async def digests_of(server: MemoryServer) -> dict[int, str]:
    bus = MemoryBus(Subjects("crash"), server)
    end = (await bus.stream_state("manifests")).last_seq
    records = [await bus.get("manifests", seq) for seq in range(1, end + 1)]
    published = [decode(r.payload, Manifest, Keyframe) for r in records if r]
    manifests = [entry for entry in published if isinstance(entry, Manifest)]
    assert [m.version for m in manifests] == list(range(len(manifests)))
    return {m.version: m.digest for m in manifests}


async def archive(server: MemoryServer, run_dir: Path, run: str = "crash") -> None:
    """Write what a recorder would have written by now."""
    bus = MemoryBus(Subjects(run), server)
    writer = ArchiveWriter(archive_dir(run_dir))
    for name in STREAMS:
        end = (await bus.stream_state(name)).last_seq
        kept = [await bus.get(name, seq) for seq in range(1, end + 1)]
        writer.append(name, [Archived(r.seq, r.subject, r.payload, r.stored_at) for r in kept if r])
    left = await bus.subjects_of("tickets", f"{bus.subjects.prefix}.ticket.>")
    writer.write_tickets_final([subject.rpartition(".")[2] for subject in left])
    writer.close()
