"""A learner on a MemoryBus whose data do not depend on timing: two runs are comparable in bytes.

As many groups are in flight as one batch takes, and a token's version follows from its group's
number, so that batch v always holds the same trajectories, of ages 0 to 2.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from services.learner.config import LearnerConfig
from services.learner.service import serve
from shared.runtime.context import Context
from shared.runtime.errors import Conflict
from shared.runtime.logs import Log
from shared.runtime.memory_bus import MemoryBus
from shared.runtime.memory_server import MemoryServer
from shared.wire.base import Array
from shared.wire.codec import content_digest, decode, encode
from shared.wire.messages import Layout, Score, SequenceScore, Terminal, Ticket, VersionScore
from shared.wire.subjects import Subjects
from shared.wire.telemetry import StepReport
from shared.wire.trajectory import Sequence as TokenSequence
from shared.wire.trajectory import Span, Trajectory
from shared.wire.weights import Manifest

SUBJECTS = Subjects("shadows")
GROUPS, SIZE, VERSIONS, VOCAB = 2, 4, 6, 32
OLDEST = 2


class Killed(BaseException):
    """Stands for kill -9: nothing in the process runs after it."""


class KilledBus(MemoryBus):
    """Ends its process right after a version's manifest is on the log."""

    at_version: int | None = None

    async def append(self, subject: str, payload: bytes, **options: Any) -> int:
        seq = await super().append(subject, payload, **options)
        if self.at_version is not None and subject == SUBJECTS.manifest:
            message = decode(payload, Manifest)
            if message.version == self.at_version:
                raise Killed
        return seq


def write_model(path: Path) -> Path:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, max_position_embeddings=64,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(path)
    return path


@dataclass
class ShadowRun:
    """One run: learner processes one after another, and everybody else in one player."""

    model_dir: Path
    run_dir: Path
    old_logprobs: dict[str, Any]
    learner: dict[str, Any] = field(default_factory=dict)
    scored_members: Sequence[int] = range(SIZE)
    """Members of each group that the oracle scores."""
    server: MemoryServer = field(default_factory=MemoryServer)
    contexts: list[Context] = field(default_factory=list)

    @property
    def config(self) -> LearnerConfig:
        tree = {
            "run": {"name": "shadows", "seed": 3, "dir": str(self.run_dir)},
            "model": {"source": str(self.model_dir)},
            "admission": {
                "groups_per_version": GROUPS, "group_size": SIZE, "max_staleness": OLDEST,
                "max_outstanding_groups": GROUPS,
            },
            "old_logprobs": self.old_logprobs,
            "learner": {
                "versions": VERSIONS,
                "optimizer": {"lr": 1e-2, "minibatches": 2},
                # bounds on D that some of the made-up sampler's tokens are beyond
                "algo": {"corrections": [{"kind": "icepop", "low": 0.7, "high": 1.4}]},
                "eval": {"episodes": 0},
                "checkpoint": {"every_versions": 2, "keep": 2},
                "allow_degenerate": ["dead_mask", "dead_clip", "degenerate_objective"],
                **self.learner,
            },
        }  # fmt: skip
        return LearnerConfig.model_validate(tree)

    async def learn(self, killed_at: int | None = None) -> bool:
        """Run one learner process to its end; return whether it was killed."""
        bus = KilledBus(SUBJECTS, self.server)
        bus.at_version = killed_at
        context = Context("learner", "learner-0", f"i{len(self.contexts)}", bus, Log("learner"))
        self.contexts.append(context)
        killed = False
        async with self._player():
            try:
                async with asyncio.timeout(60):
                    await serve(context, self.config)
            except* Killed:
                killed = True
        return killed

    @property
    def context(self) -> Context:
        """Of the process that ran last."""
        return self.contexts[-1]

    async def records(self, stream: str) -> list[bytes]:
        bus = MemoryBus(SUBJECTS, self.server)
        end = (await bus.stream_state(stream)).last_seq
        found = [await bus.get(stream, seq) for seq in range(1, end + 1)]
        return [record.payload for record in found if record]

    async def digests(self) -> dict[int, str]:
        manifests = [decode(payload, Manifest) for payload in await self.records("manifests")]
        return {m.version: m.digest for m in manifests}

    async def reports(self) -> list[StepReport]:
        return [decode(payload, StepReport) for payload in await self.records("stats")]

    @asynccontextmanager
    async def _player(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self._play())
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def _play(self) -> None:
        bus = MemoryBus(SUBJECTS, self.server)
        await bus.wait_for_streams(10.0)
        queue = await bus.work_queue("tickets", "env_agents", ack_wait_s=5.0, max_ack_pending=1000)
        while True:
            for job in await queue.next(16, 0.05):
                await self._finish(bus, decode(job.record.payload, Ticket))
                await job.ack()

    async def _finish(self, bus: MemoryBus, ticket: Ticket) -> None:
        terminal = Terminal(
            ticket_id=ticket.ticket_id, attempt_id="a", purpose="train", group_id=ticket.group_id,
            member=ticket.member, issue_version=ticket.issue_version, producer="env-0",
            outcome=played(ticket),
        )  # fmt: skip
        payload = encode(terminal)
        with suppress(Conflict):
            seq = await bus.append(
                SUBJECTS.terminal(ticket.ticket_id), payload, expect_last_subject_seq=0
            )
            # a learner that stores its scores itself has no oracle beside it
            if self.old_logprobs["route"] != "snapshot_old" and (
                ticket.member in self.scored_members
            ):
                await bus.append(
                    SUBJECTS.score(ticket.ticket_id),
                    encode(score(ticket, seq, payload, terminal.outcome)),
                    expect_last_subject_seq=0,
                )


def played(ticket: Ticket) -> Trajectory:
    """A trajectory of two turns, the first one older."""
    number = int(ticket.group_id.rpartition("-")[2].lstrip("g") or 0)
    trained_from = number // GROUPS
    newest = max(0, trained_from - ticket.member % 2)
    oldest = max(0, newest - ticket.member // 2)
    rng = np.random.default_rng([number, ticket.member])
    mask = np.array([0, 0, 1, 1, 1, 0, 1, 1, 1], np.uint8)
    spans = (Span(version=oldest, start=2, stop=5), Span(version=newest, start=6, stop=9))
    sequence = TokenSequence(
        token_ids=Array.of(rng.integers(0, VOCAB, len(mask)), "i4"),
        loss_mask=Array.of(mask, "u1"),
        spans=spans,
        arrays={"sampler_logprobs": Array.of(-3.45 + 0.3 * rng.normal(size=len(mask)), "f4")},
    )
    return Trajectory(
        status="done", reward=float(ticket.member % 2), sequences=(sequence,), task_digest="d"
    )


def score(ticket: Ticket, seq: int, payload: bytes, trajectory: Trajectory) -> Score:
    """Made up: exact by its own claim."""
    [sequence] = trajectory.sequences
    versions = sorted({span.version for span in sequence.spans})
    made_up = SequenceScore(
        old_logprobs=Array.of(np.full(sequence.token_ids.shape[0], -3.5), "f4"),
        versions=tuple(VersionScore(version=v, status="exact", digest="d") for v in versions),
    )
    return Score(
        ticket_id=ticket.ticket_id,
        terminal_seq=seq,
        terminal_digest=content_digest(payload),
        sequences=(made_up,),
        layout=Layout(backend="torch", dtype="float32", kind="packed", num_threads=1),
        producer="oracle-0",
    )
