"""Plays one episode: performs what the state machine asks for and reports back."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar, cast

from services.env_agents.environment import (
    Environment,
    EnvironmentLost,
    Observation,
    StepResult,
)
from services.env_agents.episodes import (
    Action,
    Ask,
    DeadlinePassed,
    End,
    EnvFailed,
    Episode,
    Event,
    Observed,
    ResetEnv,
    Started,
    StepEnv,
    Stepped,
)
from services.env_agents.renderer import Renderer
from services.env_agents.sampler_client import SamplerClient
from shared.runtime.context import Context
from shared.wire.messages import TaskRef, Ticket
from shared.wire.trajectory import Outcome

R = TypeVar("R")


class _EnvironmentFault(Exception):
    """The environment or the renderer failed; carried to the state machine as an event."""

    def __init__(self, event: EnvFailed) -> None:
        super().__init__(event.detail)
        self.event = event


class Player:
    """What every episode of a process shares.

    Args:
        context: counters and log.
        make_environment: makes a fresh environment.
        renderer: text <-> ids.
        sampler: asks rollouts.
        env_timeout_s: bound of one call of the environment.
    """

    def __init__(
        self,
        context: Context,
        make_environment: Callable[[], Environment],
        renderer: Renderer,
        sampler: SamplerClient,
        env_timeout_s: float,
    ) -> None:
        self._context = context
        self._make_environment = make_environment
        self._renderer = renderer
        self._sampler = sampler
        self._env_timeout_s = env_timeout_s

    async def play(self, ticket: Ticket, episode: Episode) -> Outcome:
        """Play to the end, at the latest to the ticket's deadline."""
        environment: Environment | None = None
        event: Event = Started()
        deadline = asyncio.timeout(max(0.0, ticket.deadline - time.time()))
        try:
            async with deadline:
                while True:
                    action = _only(episode.handle(event, time.time()))
                    match action:
                        case End(outcome):
                            return outcome
                        case ResetEnv():
                            try:
                                environment = self._make()
                                event = await self._reset(environment, ticket.task)
                            except _EnvironmentFault as fault:
                                event = fault.event
                        case StepEnv(token_ids):
                            assert environment is not None, "step before reset"
                            try:
                                event = await self._step(environment, token_ids)
                            except _EnvironmentFault as fault:
                                event = fault.event
                        case Ask(request, pod, delay_s):
                            if delay_s:
                                await asyncio.sleep(delay_s)
                            event = await self._sampler.ask(request, pod)
        except TimeoutError:
            if not deadline.expired():
                raise
            end = _only(episode.handle(DeadlinePassed(), time.time()))
            assert isinstance(end, End), "a deadline ends an episode"
            return end.outcome
        finally:
            self._context.count("sample_retries", episode.num_retries)
            self._context.count("resumed_turns", episode.num_resumed)
            if environment is not None:
                await self._close(environment)

    # --- the environment, bounded
    def _make(self) -> Environment:
        try:
            return self._make_environment()
        except Exception as error:
            raise _EnvironmentFault(_raised("the constructor", error)) from error

    async def _reset(self, environment: Environment, task: TaskRef) -> Observed:
        observation = cast(object, await self._bounded("reset", environment.reset(task)))
        try:
            if not isinstance(observation, Observation):
                raise TypeError(f"returned {type(observation).__name__}, not Observation")
            digest = str(environment.task_digest())
            return Observed(self._renderer.prompt(observation.text), digest)
        except Exception as error:
            raise _EnvironmentFault(_raised("reset", error)) from error

    async def _step(self, environment: Environment, token_ids: list[int]) -> Stepped:
        self._context.count("env_steps")
        try:
            answer = self._renderer.decode(token_ids)
        except Exception as error:
            raise _EnvironmentFault(_raised("decoding an answer", error)) from error
        result = cast(object, await self._bounded("step", environment.step(answer)))
        try:
            if not isinstance(result, StepResult):
                raise TypeError(f"returned {type(result).__name__}, not StepResult")
            ends = bool(result.terminated or result.truncated)
            rewards = {str(name): float(value) for name, value in result.rewards.items()}
            reward = float(result.reward)
            if not all(map(math.isfinite, (reward, *rewards.values()))):
                raise ValueError(f"reward is not finite: {reward}, {rewards}")
            ids = [] if ends else self._renderer.observation(result.observation.text)
            return Stepped(ids, reward, bool(result.terminated), bool(result.truncated), rewards)
        except Exception as error:
            raise _EnvironmentFault(_raised("step", error)) from error

    async def _bounded(self, call: str, awaited: Awaitable[R]) -> R:
        bound = asyncio.timeout(self._env_timeout_s)
        try:
            async with bound:
                return await awaited
        except TimeoutError as error:
            if not bound.expired():
                raise _EnvironmentFault(_raised(call, error)) from error
            detail = f"{call} took longer than env_timeout_s ({self._env_timeout_s:g} s)"
            raise _EnvironmentFault(EnvFailed("env_timeout", detail)) from error
        except Exception as error:
            raise _EnvironmentFault(_raised(call, error)) from error

    async def _close(self, environment: Environment) -> None:
        try:
            await self._bounded("close", environment.close())
        except _EnvironmentFault as fault:
            # The outcome stands: what an environment leaves behind is not the policy's doing.
            self._context.count("env_close_failures")
            self._context.log.warning("env_close_failed", detail=fault.event.detail)


def _raised(call: str, error: BaseException) -> EnvFailed:
    if isinstance(error, EnvironmentLost):
        return EnvFailed("env_lost", f"{call}: {error}")
    return EnvFailed("env_error", f"{call}: {type(error).__name__}: {error}")


def _only(actions: list[Action]) -> Action:
    (action,) = actions
    return action
