"""Episodes under a simulated lag: the product's engine and environment, one turn at a time.

Which version samples which turn is decided beforehand. When a version is published, every episode
under way that is due to it goes on, whatever version it will be trained at; what the engine knew of
the version before is forgotten at the switch, as in a live run.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from services.env_agents.renderer import Renderer
from services.env_agents.sequence_builder import SequenceBuilder
from services.env_agents.tasks.frozen_lake import FrozenLake
from services.rollout.engine import SampleResult, SampleSpec
from services.rollout.torch_engine import TorchEngine
from shared.cli.bench_routes_cells import Lag
from shared.cli.bench_routes_world import CONTEXT_TOKENS
from shared.wire.messages import TaskRef
from shared.wire.trajectory import SamplingParams, Trajectory, Turn

MAX_TURNS = 10
JUMPS = (1 / 3, 2 / 3)
"""Shares of the run after which the lag `jump` goes from 8 to 0 and back."""


@dataclass(frozen=True, slots=True)
class Play:
    """One episode to play."""

    task: TaskRef
    seed: int
    versions: tuple[int, ...]
    """Of every turn, ascending."""


def turn_versions(lag: Lag, version: int, num_versions: int, rng: random.Random) -> tuple[int, ...]:
    """Return which version samples each turn of an episode that is trained at `version`.

    `mixed8`: it starts a versions behind, a uniform in 4..12, and moves on after every 1, 2 or 3
    turns. `jump`: a lag of 8, then of 0, then of 8.
    """
    if lag == "mixed8":
        first, pace = version - rng.randint(4, 12), rng.randint(1, 3)
        return tuple(min(version, max(0, first + turn // pace)) for turn in range(MAX_TURNS))
    if lag == "jump":
        low, high = (share * num_versions for share in JUMPS)
        age = 0 if low <= version < high else 8
    else:
        age = int(lag)
    return (max(0, version - age),) * MAX_TURNS


def oldest_age(lag: Lag) -> int:
    """Return the largest age in versions that a token can have."""
    return {"mixed8": 12, "jump": 8}[lag] if lag in ("mixed8", "jump") else int(lag)


class Player:
    """Plays episodes on one engine of its own."""

    def __init__(self, model_dir: Path, renderer: Renderer) -> None:
        self._engine = TorchEngine(
            model_dir,
            dtype="float32",
            context_tokens=CONTEXT_TOKENS,
            max_running=512,
            kv_slots=512,
            step_tokens=1 << 16,
        )
        self._renderer = renderer
        self._sampling = SamplingParams(max_new_tokens=1, stop_ids=renderer.stop_ids)
        self._num_played = 0

    async def start(self) -> None:
        await self._engine.start()

    async def close(self) -> None:
        await self._engine.close()

    def episode(self, play: Play) -> Episode:
        """Return an episode that nothing was sampled for yet."""
        return Episode(play, self._renderer)

    async def advance(
        self, episodes: Sequence[Episode], version: int, weights: Mapping[str, torch.Tensor]
    ) -> None:
        """Sample every turn that is due to a version, with its weights."""
        due = [episode for episode in episodes if episode.next_version == version]
        if due:
            await self._engine.update(version, weights, None)
            await asyncio.gather(*(self._turns(episode, version) for episode in due))

    async def _turns(self, episode: Episode, version: int) -> None:
        while episode.next_version == version:
            self._num_played += 1
            spec = SampleSpec(
                request_id=str(self._num_played),
                token_ids=await episode.prefix(),
                sampling=self._sampling,
                max_new_tokens=self._sampling.max_new_tokens,
                seed=episode.turn_seed(),
            )
            await episode.take(await self._engine.sample(spec))


@dataclass(eq=False)
class Episode:
    """One episode; under way once its first turn is due."""

    play: Play
    renderer: Renderer
    env: FrozenLake = field(default_factory=lambda: FrozenLake({}))
    builder: SequenceBuilder = field(default_factory=lambda: SequenceBuilder(CONTEXT_TOKENS))
    turns: list[Turn] = field(default_factory=list[Turn])
    reward: float = 0.0
    ended: bool = False
    terminated: bool = False

    @property
    def next_version(self) -> int:
        """Of the next turn; -1: there is none."""
        return -1 if self.ended else self.play.versions[len(self.turns)]

    async def prefix(self) -> tuple[int, ...]:
        """Return the tokens so far; the environment is asked for the first ones."""
        if not self.turns:
            observation = await self.env.reset(self.play.task)
            self.builder.append_context(self.renderer.prompt(observation.text))
        return tuple(self.builder.ids_from(0))

    def turn_seed(self) -> int:
        return self.play.seed * MAX_TURNS + len(self.turns)

    async def take(self, result: SampleResult) -> None:
        start = len(self.builder)
        self.builder.append_sampled(result.sampled)
        finish = "stop" if result.finish == "stop" else "length"
        self.turns.append(Turn(start=start, stop=len(self.builder), finish=finish))
        step = await self.env.step(self.renderer.decode(self.builder.ids_from(start)))
        self.reward += step.reward
        self.terminated, self.ended = step.terminated, step.terminated or step.truncated
        if not self.ended:
            self.builder.append_context(self.renderer.observation(step.observation.text))

    def trajectory(self) -> Trajectory:
        return Trajectory(
            status="done" if self.terminated else "truncated",
            reward=self.reward,
            sequences=(self.builder.build(self.turns),),
            task_digest=self.env.task_digest(),
        )
