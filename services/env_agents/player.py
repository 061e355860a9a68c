"""Plays one episode: performs what the state machine asks for and reports back."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar, cast

from services.env_agents.answer import Answer
from services.env_agents.environment import (
    ActsOnAnswers,
    Environment,
    EnvironmentLost,
    Observation,
    StepResult,
)
from services.env_agents.episode_events import (
    Action,
    Ask,
    DeadlinePassed,
    End,
    EnvFailed,
    Event,
    Observed,
    ResetEnv,
    Started,
    StepEnv,
    Stepped,
)
from services.env_agents.episodes import Episode
from services.env_agents.renderer import (
    Continuation,
    Conversation,
    ConversationRenderer,
    Renderer,
    TextConversation,
)
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
        renderer: Renderer | ConversationRenderer,
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
        conversation = self._conversation()
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
                                event = await self._reset(environment, conversation, ticket.task)
                            except _EnvironmentFault as fault:
                                event = fault.event
                        case StepEnv():
                            assert environment is not None, "step before reset"
                            try:
                                event = await self._step(environment, conversation, action, episode)
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

    def _conversation(self) -> Conversation:
        if isinstance(self._renderer, ConversationRenderer):
            return self._renderer.conversation()
        return TextConversation(self._renderer)

    async def _reset(
        self, environment: Environment, conversation: Conversation, task: TaskRef
    ) -> Observed:
        observation = cast(object, await self._bounded("reset", environment.reset(task)))
        try:
            if not isinstance(observation, Observation):
                raise TypeError(f"returned {type(observation).__name__}, not Observation")
            digest = str(environment.task_digest())
            token_ids = conversation.begin(observation)
            return Observed(token_ids, digest, observation.max_new_tokens)
        except Exception as error:
            raise _EnvironmentFault(_raised("reset", error)) from error

    async def _step(
        self,
        environment: Environment,
        conversation: Conversation,
        action: StepEnv,
        episode: Episode,
    ) -> Stepped:
        self._context.count("env_steps")
        try:
            text, parsed = conversation.read(action.token_ids)
        except Exception as error:
            raise _EnvironmentFault(_raised("decoding an answer", error)) from error
        if isinstance(environment, ActsOnAnswers):
            sampled = episode.last_answer()
            answer = Answer(
                text=text,
                parsed=parsed,
                token_ids=tuple(action.token_ids),
                logprobs=tuple(sampled.logprobs.numpy().tolist()),
                spans=sampled.spans,
                finish=episode.finish,
                num_context=episode.num_context,
            )
            result = cast(object, await self._bounded("act", environment.act(answer)))
        else:
            result = cast(object, await self._bounded("step", environment.step(text)))
        try:
            return _stepped(conversation, result)
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
        except (Exception, SystemExit) as error:
            raise _EnvironmentFault(_raised(call, error)) from error

    async def _close(self, environment: Environment) -> None:
        try:
            await self._bounded("close", environment.close())
        except _EnvironmentFault as fault:
            # The outcome stands: what an environment leaves behind is not the policy's doing.
            self._context.count("env_close_failures")
            self._context.log.warning("env_close_failed", detail=fault.event.detail)


def _stepped(conversation: Conversation, result: object) -> Stepped:
    """Check what an environment returned, and render what it says next.

    Raises:
        TypeError: it is no StepResult.
        ValueError: a reward is not finite, or the observation cannot be rendered.
    """
    if not isinstance(result, StepResult):
        raise TypeError(f"returned {type(result).__name__}, not StepResult")
    rewards = {str(name): float(value) for name, value in result.rewards.items()}
    reward = float(result.reward)
    if not all(map(math.isfinite, (reward, *rewards.values()))):
        raise ValueError(f"reward is not finite: {reward}, {rewards}")
    ends = bool(result.terminated or result.truncated)
    read = Continuation([]) if ends else conversation.follow(result.observation)
    return Stepped(
        read.token_ids,
        reward,
        bool(result.terminated),
        bool(result.truncated),
        rewards,
        rewrites=read.rewrites,
        continues=read.continues,
        max_new_tokens=None if ends else result.observation.max_new_tokens,
    )


def _raised(call: str, error: BaseException) -> EnvFailed:
    if isinstance(error, EnvironmentLost):
        return EnvFailed("env_lost", f"{call}: {error}")
    return EnvFailed("env_error", f"{call}: {type(error).__name__}: {error}")


def _only(actions: list[Action]) -> Action:
    (action,) = actions
    return action
