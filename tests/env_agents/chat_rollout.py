"""A rollout whose policy is a script of texts, for a chat fixture, on a MemoryBus."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from services.env_agents.config import EnvAgentsConfig
from shared.runtime.context import Context
from shared.runtime.memory_bus import MemoryBus
from shared.wire.base import Array
from shared.wire.messages import Accepted, Done, SampledTokens, SampleRequest, Ticket
from shared.wire.trajectory import Outcome, SamplingParams, Span
from tests.env_agents.chat.conversations import DATE, MODELS, PARSERS, renderer
from tests.env_agents.rollout_stand_in import (
    Send,
    StandInRollout,
    issue,
    make_context,
    make_ticket,
    serving,
    terminal,
)

Policy = Callable[[str], str]
"""Text of the prompt -> text of the answer, stop token left out."""


def chat_config(family: str, environment: str, **options: Any) -> EnvAgentsConfig:
    return EnvAgentsConfig.model_validate(
        {
            "env_agents": {"concurrency": 8, "heartbeat_s": 2.0, "pull_timeout_s": 0.05},
            "model": {"source": str(MODELS / family)},
            "sampling": {"context_tokens": 16384, "max_new_tokens": 512},
            "task": {
                "environment": environment,
                "renderer": "services.env_agents.chat.renderer:ChatRenderer",
                "renderer_options": {"tool_parser": PARSERS[family], "date": DATE},
                "options": options,
                "max_turns": 40,
            },
        }
    )


def speaking(family: str, policy: Policy, version: int = 5) -> Callable[..., Any]:
    """A script for `StandInRollout`: the policy's text as tokens, log-probs -0.25 each."""
    tokenizer = renderer(family).tokenizer
    stop = renderer(family).stop_ids[-1 if family == "llama3" else 0]

    async def answer(rollout: StandInRollout, request: SampleRequest, send: Send) -> bool:
        text = policy(tokenizer.decode(request.token_ids.numpy().tolist()))
        ids = [*tokenizer.encode(text), stop]
        finish = "stop"
        if len(ids) > request.max_new_tokens:
            ids, finish = ids[: request.max_new_tokens], "length"
        sampled = SampledTokens(
            token_ids=Array.of(ids, "i4"),
            logprobs=Array.of([-0.25] * len(ids), "f4"),
            spans=(Span(version=version, start=0, stop=len(ids)),),
        )
        await send(Accepted(version=version))
        await send(Done(sampled=sampled, finish=finish))  # type: ignore[arg-type]
        return True

    return answer


def chat_ticket(index: int = 0, **changes: Any) -> Ticket:
    return make_ticket(index, sampling=SamplingParams(max_new_tokens=512), **changes)


async def play(
    bus: MemoryBus, config: EnvAgentsConfig, ticket: Ticket, *, timeout_s: float = 30.0
) -> tuple[Outcome, Context]:
    """Play one ticket through the whole service."""
    async with serving(make_context(bus.server), config) as context:
        await issue(bus, ticket)
        return (await terminal(bus, ticket.ticket_id, timeout_s)).outcome, context


@asynccontextmanager
async def scripted(bus: MemoryBus, family: str, policy: Policy) -> AsyncIterator[StandInRollout]:
    """A rollout that speaks for the length of the block."""
    started = await StandInRollout(bus, "pod-a").start()
    started.script = speaking(family, policy)
    yield started
    await started.kill()
