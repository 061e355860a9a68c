"""A scripted rollout on a MemoryBus, and what the service tests share."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from services.env_agents.config import EnvAgentsConfig
from services.env_agents.service import serve
from services.env_agents.tasks.frozen_lake import draw_map, expert_actions
from services.env_agents.text_renderer import TextRenderer
from shared.runtime.bus import CoreMessage
from shared.runtime.context import Context
from shared.runtime.logs import Log
from shared.runtime.memory_bus import MemoryBus
from shared.runtime.memory_server import MemoryServer
from shared.wire.base import Array
from shared.wire.codec import decode, encode
from shared.wire.messages import (
    Accepted,
    Behind,
    CancelRequest,
    Done,
    Heartbeat,
    Partial,
    Refused,
    SampledTokens,
    SampleReply,
    SampleRequest,
    TaskRef,
    Terminal,
    Ticket,
)
from shared.wire.subjects import Subjects
from shared.wire.trajectory import SamplingParams, Span

BASE = str(Path(__file__).parent / "char_model")
SUBJECTS = Subjects("test")

Body = Accepted | Heartbeat | Behind | Partial | Done | Refused


class StandInRollout:
    """Answers every request with the expert's move, unless the script says otherwise.

    `script(rollout, request, send)` returns True when it has dealt with the request itself.
    """

    def __init__(self, bus: MemoryBus, pod: str, version: int = 0) -> None:
        self.bus = bus
        self.pod = pod
        self.version = version
        self.requests: list[SampleRequest] = []
        self.cancelled: list[str] = []
        self.script: Callable[[StandInRollout, SampleRequest, Send], Awaitable[bool]] | None = None
        self._renderer = TextRenderer(BASE, {})
        self._subscriptions: list[Any] = []
        self.alive = True

    async def start(self) -> StandInRollout:
        subjects = self.bus.subjects
        self._subscriptions = [
            await self.bus.subscribe(subjects.sample("policy"), self._serve, queue="rollout"),
            await self.bus.subscribe(subjects.sample_pod(self.pod), self._serve),
            await self.bus.subscribe(subjects.cancel(self.pod), self._cancel),
        ]
        return self

    async def kill(self) -> None:
        """Gone at once: no last word."""
        self.alive = False
        for subscription in self._subscriptions:
            await subscription.close()

    def expert(self, request: SampleRequest) -> list[int]:
        """Token ids of the rest of the expert's answer."""
        text = self._renderer.decode(request.token_ids.numpy().tolist())
        position = text.rindex("@")
        row, column = int(text[position + 1]), int(text[position + 2])
        word = expert_actions("\n".join(text.split("\n")[:4]))[4 * row + column]
        written = text[position + 4 :]
        assert word.startswith(written), "resumed with what was sampled"
        return self._renderer.observation(word[len(written) :] + "\n")

    def tokens(self, ids: list[int]) -> SampledTokens:
        return SampledTokens(
            token_ids=Array.of(ids, "i4"),
            logprobs=Array.of([-0.25] * len(ids), "f4"),
            spans=(Span(version=self.version, start=0, stop=len(ids)),) if ids else (),
        )

    def done(self, request: SampleRequest) -> Done:
        return Done(sampled=self.tokens(self.expert(request)), finish="stop")

    async def _serve(self, message: CoreMessage) -> None:
        request = decode(message.payload, SampleRequest)
        self.requests.append(request)

        async def send(body: Body, request_id: str = "") -> None:
            reply = SampleReply(
                request_id=request_id or request.request_id, pod=self.pod, body=body
            )
            await self.bus.publish(message.reply, encode(reply))

        if self.script is not None and await self.script(self, request, send):
            return
        await send(Accepted(version=self.version))
        await send(self.done(request))

    async def _cancel(self, message: CoreMessage) -> None:
        self.cancelled.append(decode(message.payload, CancelRequest).request_id)


Send = Callable[..., Awaitable[None]]


def make_config(**env_agents: object) -> EnvAgentsConfig:
    section: dict[str, object] = {
        "concurrency": 8,
        "heartbeat_s": 0.02,
        "backoff_s": 0.005,
        "backoff_max_s": 0.02,
        "pull_timeout_s": 0.05,
        "drain_s": 1.0,
        **env_agents,
    }
    task = section.pop("task", {})
    return EnvAgentsConfig.model_validate(
        {"env_agents": section, "model": {"source": BASE}, "task": task}
    )


def make_context(server: MemoryServer, pod: str = "env-0") -> Context:
    return Context(
        role="env_agents",
        pod=pod,
        incarnation="i",
        bus=MemoryBus(SUBJECTS, server, name=pod),
        log=Log("env_agents", pod),
    )


def make_ticket(index: int = 0, **changes: object) -> Ticket:
    return Ticket(
        ticket_id=f"t{index}",
        purpose="train",
        group_id=f"g{index // 8}",
        member=index % 8,
        group_size=8,
        task=TaskRef(dataset="frozen_lake", split="train", index=index, seed=1),
        issue_version=0,
        min_version=0,
        deadline=time.time() + 30,
        sampling=SamplingParams(max_new_tokens=8, stop_ids=(0,)),
        seed=index,
    ).model_copy(update=changes)


async def issue(bus: MemoryBus, *tickets: Ticket) -> None:
    for ticket in tickets:
        await bus.append(
            SUBJECTS.ticket(ticket.ticket_id), encode(ticket), expect_last_subject_seq=0
        )


async def terminal(bus: MemoryBus, ticket_id: str = "t0", timeout_s: float = 5.0) -> Terminal:
    """The terminal of a ticket, as soon as it is stored."""
    async with asyncio.timeout(timeout_s):
        while True:
            record = await bus.last(SUBJECTS.terminal(ticket_id))
            if record is not None:
                return decode(record.payload, Terminal)
            await asyncio.sleep(0.005)


async def eventually(condition: Callable[[], object], timeout_s: float = 5.0) -> None:
    """Poll until the condition holds."""
    for _ in range(int(timeout_s / 0.005)):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise TimeoutError(f"not within {timeout_s:g} s")


async def settled(bus: MemoryBus, timeout_s: float = 5.0) -> None:
    """Wait until no ticket is left in the stream."""
    tickets = bus.server.streams[SUBJECTS.stream("tickets")]
    await eventually(lambda: not tickets.records, timeout_s)


@asynccontextmanager
async def serving(context: Context, config: EnvAgentsConfig) -> AsyncIterator[Context]:
    """An env agent that runs for the length of the block and then stops as on SIGTERM."""
    async with asyncio.TaskGroup() as group:
        task = group.create_task(serve(context, config))
        yield context
        context.stop.set()
        async with asyncio.timeout(5):
            await task


def fewest_moves(index: int) -> int:
    """Turns the expert needs on the training task `index`."""
    expert = expert_actions(draw_map("train", 1, index))
    state, moves = 0, 0
    step = {"left": -1, "right": 1, "up": -4, "down": 4}
    while state in expert:
        state += step[expert[state]]
        moves += 1
    return moves
