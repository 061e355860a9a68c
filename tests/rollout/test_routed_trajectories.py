"""From the engine into the trajectory: every version can be replayed with what it chose itself."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import cast

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from services.env_agents.episode_events import (
    Ask,
    End,
    Observed,
    Replied,
    Started,
    StepEnv,
    Stepped,
)
from services.env_agents.episodes import Episode, Limits
from services.rollout.requests import _on_the_wire, _spec
from services.rollout.torch_engine import TorchEngine
from shared.backends.torch_backend import TorchBackend
from shared.backends.trajectory_scoring import pieces_of, score_pieces
from shared.wire.base import Array
from shared.wire.messages import Done, Partial, TaskRef, Ticket
from shared.wire.trajectory import RoutingRecord, SamplingParams, Trajectory
from tests.rollout.engines import CONTEXT, make_prompt, started, when_sampled
from tests.rollout.models import State
from tests.rollout.moe_models import make_moe_state, moe_reference, write_moe_dir

TURNS, NEW = 4, 7


class Play:
    """One episode on engines that are updated and interrupted while it is played."""

    def __init__(self, engines: list[TorchEngine], states: list[State], seed: int) -> None:
        self.engines = engines
        self.states = states
        self.random = Random(seed)
        self.num_left_out = 0
        """Tokens that a request said it holds, under the version that then sampled first."""

    async def whole(self) -> Trajectory:
        ticket = Ticket(
            ticket_id="t", purpose="train", group_id="g", member=0, group_size=1,
            task=TaskRef(dataset="d", split="train", index=0, seed=0),
            issue_version=0, min_version=0, deadline=1000.0,
            sampling=SamplingParams(max_new_tokens=NEW), seed=5,
        )  # fmt: skip
        limits = Limits(max_turns=TURNS, context_tokens=CONTEXT, backoff_s=0, backoff_max_s=0)
        episode = Episode(ticket, "a", limits, (), jitter=lambda: 0.0)
        event: object = Started()
        for _ in range(200):
            (action,) = episode.handle(event, 1.0)  # type: ignore[arg-type]
            match action:
                case End(outcome):
                    assert episode.num_retries == 0
                    return cast("Trajectory", outcome)
                case Ask():
                    event = await self.answered(action)
                case StepEnv():
                    event = Stepped(
                        list(make_prompt(self.random.randrange(99), 3)), 0.0, False, False
                    )
                case _:
                    event = Observed(list(make_prompt(1, 20)), "digest")
        raise AssertionError("it never ended")

    async def answered(self, ask: Ask) -> Replied:
        """Sample a request; perhaps swap weights in mid-turn, perhaps end it before its time."""
        engine, request = self.random.choice(self.engines), ask.request
        before, most = engine.version, min(4, request.max_new_tokens)
        async with asyncio.TaskGroup() as group:
            answer = group.create_task(engine.sample(_spec(request)))
            await asyncio.sleep(0)
            if self.random.random() < 0.5 and engine.version + 1 < len(self.states):
                await when_sampled(engine, request.request_id, self.random.randrange(most))
                version = engine.version + 1
                await engine.update(version, self.states[version], None)
            if self.random.random() < 0.4 and request.max_new_tokens > 4:
                await when_sampled(engine, request.request_id, 4)
                engine.interrupt(request.request_id)
        result = answer.result()
        held = request.routing_held
        if held and held.version == before and result.sampled.spans[0].version == before:
            self.num_left_out += held.stop
        sampled = _on_the_wire(result.sampled)
        if result.finish == "interrupted":
            body: Partial | Done = Partial(sampled=sampled, reason="interrupt")
        else:
            body = Done(sampled=sampled, finish="length")
        return Replied(request.request_id, "p", body)


@pytest.mark.parametrize("seed", range(6))
async def test_every_version_has_the_routing_of_all_that_it_sampled_after(
    tmp_path: Path, seed: int
) -> None:
    path = write_moe_dir(tmp_path / "moe")
    states = [make_moe_state(version, torch.float64) for version in range(4)]

    def make() -> TorchEngine:
        return TorchEngine(path, dtype="float64", context_tokens=CONTEXT, record_routing=True)

    async with started(make()) as one, started(make()) as other:
        engines = [cast("TorchEngine", one), cast("TorchEngine", other)]
        for engine in engines:
            await engine.update(0, states[0], None)
        play = Play(engines, states, seed)
        trajectory = await play.whole()
    assert play.num_left_out > 0
    (sequence,) = trajectory.sequences
    ids = sequence.token_ids.numpy().tolist()
    assert len({span.version for span in sequence.spans}) > 1
    backend = TorchBackend(torch.float64, trains=False)
    save_file(states[0], path / "model.safetensors", {"format": "pt"})
    backend.load_hf(path)
    sampler = sequence.arrays["sampler_logprobs"].numpy()
    for piece in pieces_of(trajectory, kind="packed", temperature=1.0):
        last = int(piece.positions[-1])
        assert piece.can_be_exact
        assert piece.routing is not None
        _, experts = moe_reference(states[piece.version], ids)
        assert piece.routing[:last].tolist() == experts[:last].tolist()
        backend.load_state(states[piece.version])
        others = RoutingRecord(
            version=piece.version,
            start=0,
            stop=last,
            experts=Array.of((piece.routing[:last] + 1) % 8, "u1"),
        )
        right, wrong = (
            score_pieces(backend, [replace(piece, records=records)], "packed")[0]
            for records in (piece.records, (others,))
        )
        # The engine's log-probs travel as float32.
        assert np.abs(right - sampler[piece.positions]).max() < 1e-6
        assert np.abs(wrong - right).max() > 1e-2
