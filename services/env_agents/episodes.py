"""One episode as a pure state machine: what happened in, what to do next out.

No clock, no IO, no text: the player (`player.py`) performs the actions, renders text to ids and
reports back. At any moment the machine waits for the answer to exactly one action.

    ResetEnv -> Observed -> Ask -> Replied | Unanswered -> ... -> StepEnv -> Stepped -> Ask ... End

A reply that completes the turn leads to the environment; a partial one is kept and the rest asked
for, anywhere; everything else is asked again, elsewhere or later, until the ticket's deadline.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from services.env_agents.episode_events import (
    Action,
    Ask,
    DeadlinePassed,
    End,
    EnvFailed,
    Event,
    Observed,
    Replied,
    ResetEnv,
    Started,
    StepEnv,
    Stepped,
    Unanswered,
)
from services.env_agents.episode_tokens import EpisodeTokens
from services.env_agents.sequence_builder import SequenceBuilder
from shared.wire.messages import (
    Behind,
    Done,
    Partial,
    Refused,
    SampledTokens,
    SampleRequest,
    Ticket,
)
from shared.wire.trajectory import (
    Failure,
    FailureReason,
    Outcome,
    Trajectory,
    Turn,
)
from shared.wire.trajectory import (
    Sequence as TokenSequence,
)


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of an episode, from the configuration."""

    max_turns: int
    context_tokens: int
    """Longest prompt + answers of the sequence."""
    backoff_s: float
    backoff_max_s: float


class Episode:
    """One attempt at one ticket.

    Args:
        ticket: what to play.
        attempt_id: unique per delivery; prefix of the request ids.
        limits: bounds.
        stop_ids: end an answer, where the ticket names none.
        jitter: numbers in [0, 1) that spread the back-off of many episodes.
    """

    def __init__(
        self,
        ticket: Ticket,
        attempt_id: str,
        limits: Limits,
        stop_ids: tuple[int, ...],
        jitter: Callable[[], float],
    ) -> None:
        self.num_retries = 0
        """Requests that had to be sent again."""
        self.num_resumed = 0
        """Partial answers that were continued."""
        self._ticket = ticket
        self._attempt_id = attempt_id
        self._limits = limits
        self._jitter = jitter
        own = ticket.sampling.stop_ids or not stop_ids
        self._sampling = (
            ticket.sampling if own else ticket.sampling.model_copy(update={"stop_ids": stop_ids})
        )
        self._waits_for: type[Event] | None = Started
        """None: the episode is over."""
        self._started_at = 0.0
        self._tokens = EpisodeTokens(limits.context_tokens)
        self._task_digest = ""
        self._reward = 0.0
        self._rewards: dict[str, float] = {}
        self._pod: str | None = None
        # the turn under way
        self._turn_start = 0
        self._turn_stop = 0
        self._turn_pods: list[str] = []
        self._finish: Literal["stop", "length"] = "stop"
        # the request under way
        self._num_requests = 0
        self._request_id = ""
        self._asked_pod: str | None = None
        self._setbacks = 0
        self._last_setback = ""

    def handle(self, event: Event, now: float) -> list[Action]:
        """Advance by one event at `now` (Unix seconds); what was not waited for is ignored."""
        match event:
            case DeadlinePassed() if self._waits_for:
                return self._past_deadline()
            case EnvFailed(reason, detail) if self._waits_for in (Observed, Stepped):
                return self._fail(reason, detail)
            case Started() if self._waits_for is Started:
                self._started_at = now
                if now >= self._ticket.deadline:
                    return self._past_deadline()
                self._waits_for = Observed
                return [ResetEnv()]
            case Observed() if self._waits_for is Observed:
                return self._begin(event)
            case Replied(request_id, pod, body) if request_id == self._request_id:
                return self._replied(pod, body)
            case Unanswered(request_id, cause) if request_id == self._request_id:
                return self._ask_again(cause, at_once=cause == "silence")
            case Stepped() if self._waits_for is Stepped:
                return self._stepped(event, now)
            case _:
                return []

    def partial(self, below: int) -> tuple[TokenSequence, ...] | None:
        """Return all tokens so far if any below version `below` was sampled since the last time."""
        return self._tokens.partial(below)

    @property
    def finish(self) -> Literal["stop", "length"]:
        """How the last answer ended."""
        return self._finish

    @property
    def num_context(self) -> int:
        """Tokens before the last answer."""
        return self._turn_start

    def last_answer(self) -> SampledTokens:
        """Return the answer that the environment is stepped with."""
        return self._builder.sampled_from(self._turn_start)

    @property
    def _builder(self) -> SequenceBuilder:
        """The sequence that grows."""
        return self._tokens.current

    # --- turns
    def _begin(self, first: Observed) -> list[Action]:
        self._task_digest = first.task_digest
        token_ids = first.token_ids
        if not token_ids:
            return self._fail("env_error", "the first observation is empty")
        if len(token_ids) >= self._builder.room:
            return self._fail(
                "too_long",
                f"the first observation has {len(token_ids)} tokens, "
                f"context_tokens is {self._limits.context_tokens}",
            )
        self._builder.append_context(token_ids)
        return self._next_turn(first.max_new_tokens)

    def _next_turn(self, bound: int | None) -> list[Action]:
        self._turn_start = len(self._builder)
        most = min(self._sampling.max_new_tokens, self._builder.room)
        self._turn_stop = self._turn_start + (most if bound is None else max(1, min(bound, most)))
        self._turn_pods = []
        return self._ask(self._pod)

    def _stepped(self, step: Stepped, now: float) -> list[Action]:
        self._reward += step.reward
        named = dict(step.rewards)
        for name, value in named.items():
            self._rewards[name] = self._rewards.get(name, 0.0) + value
        if step.reward:
            named.setdefault("reward", step.reward)
        self._tokens.close_turn(
            Turn(
                start=self._turn_start,
                stop=len(self._builder),
                finish=self._finish,
                rewards=named,
                sampling=None if self._sampling is self._ticket.sampling else self._sampling,
                pods=tuple(self._turn_pods),
            )
        )
        over = step.terminated or step.truncated or self._tokens.num_turns >= self._limits.max_turns
        room = self._limits.context_tokens if step.rewrites else self._builder.room
        # An observation that leaves no room for an answer ends the episode with the reward so far.
        if over or len(step.token_ids) >= room:
            return self._end("done" if step.terminated else "truncated", now)
        if step.rewrites:
            # A pod that holds the prefix of the old history holds at least its beginning.
            self._tokens.begin(step.token_ids, continues=step.continues)
        else:
            self._builder.append_context(step.token_ids)
        return self._next_turn(step.max_new_tokens)

    # --- sampling
    def _ask(self, pod: str | None, delay_s: float = 0.0) -> list[Action]:
        self._num_requests += 1
        self._request_id = f"{self._attempt_id}-{self._num_requests}"
        self._asked_pod = pod
        self._waits_for = Replied
        position = len(self._builder)
        request = SampleRequest(
            request_id=self._request_id,
            ticket_id=self._ticket.ticket_id,
            model_id=self._ticket.model_id,
            adapter_id=self._ticket.adapter_id,
            token_ids=self._builder.token_ids(),
            sampling=self._sampling,
            max_new_tokens=self._turn_stop - position,
            min_version=self._ticket.min_version,
            seed=turn_seed(self._ticket.seed, self._tokens.num_turns),
            seed_offset=position - self._turn_start,
            expires=self._ticket.deadline,
            routing_held=self._builder.routing_held(),
        )
        return [Ask(request, pod, delay_s)]

    def _replied(self, pod: str, body: Behind | Partial | Done | Refused) -> list[Action]:
        match body:
            case Behind(version=version):
                return self._ask_again(f"{pod} is at version {version}")
            case Refused(reason=reason, retryable=True):
                return self._ask_again(f"{pod}: {reason}")
            case Refused(reason=reason):
                return self._fail("sample_refused", f"{pod}: {reason}")
            case Partial(sampled=sampled) | Done(sampled=sampled):
                return self._sampled(pod, body, sampled)

    def _sampled(self, pod: str, body: Partial | Done, sampled: SampledTokens) -> list[Action]:
        left = self._turn_stop - len(self._builder)
        flaw = _flaw(sampled, left, self._ticket.min_version, isinstance(body, Done))
        flaw = flaw or self._builder.routing_flaw(sampled)
        if flaw:
            return self._ask_again(f"{pod} {flaw}")
        gained = sampled.token_ids.shape[0]
        if gained:
            self._builder.append_sampled(sampled)
            self._clear_setbacks()
            if not self._turn_pods or self._turn_pods[-1] != pod:
                self._turn_pods.append(pod)
        if isinstance(body, Done):
            self._pod = pod
            return self._close_turn(body.finish)
        self._pod = None
        if gained and int(sampled.token_ids.numpy()[-1]) in self._sampling.stop_ids:
            return self._close_turn("stop")
        if gained == left:
            return self._close_turn("length")
        if not gained:
            return self._ask_again(f"{pod}: {body.reason}")
        self.num_resumed += 1
        return self._ask(None)

    def _close_turn(self, finish: Literal["stop", "length"]) -> list[Action]:
        self._request_id = ""
        self._clear_setbacks()
        self._finish = finish
        self._waits_for = Stepped
        return [StepEnv(self._builder.ids_from(self._turn_start))]

    def _ask_again(self, setback: str, *, at_once: bool = False) -> list[Action]:
        """Ask anyone: at once when only the pod of the prefix said no, else after a back-off."""
        self.num_retries += 1
        self._last_setback = setback
        delay_s = 0.0
        if self._asked_pod is None and not at_once:
            full = min(self._limits.backoff_max_s, self._limits.backoff_s * 2**self._setbacks)
            delay_s = full * (0.5 + 0.5 * self._jitter())
            self._setbacks = min(self._setbacks + 1, 30)
        self._pod = None
        return self._ask(None, delay_s)

    def _clear_setbacks(self) -> None:
        self._setbacks = 0
        self._last_setback = ""

    # --- ends
    def _end(self, status: Literal["done", "truncated"], now: float) -> list[Action]:
        return self._over(
            Trajectory(
                status=status,
                reward=self._reward,
                rewards=self._rewards,
                sequences=self._tokens.build(),
                task_digest=self._task_digest,
                played_s=max(0.0, now - self._started_at),
            )
        )

    def _past_deadline(self) -> list[Action]:
        if self._last_setback:
            return self._fail("sample_timeout", f"no rollout served it: {self._last_setback}")
        doing: dict[type[Event] | None, str] = {
            Observed: "the reset",
            Replied: "a rollout",
            Stepped: "a step",
        }
        waiting = doing.get(self._waits_for, "a place")
        return self._fail(
            "deadline", f"after {self._tokens.num_turns} turns, waiting for {waiting}"
        )

    def _fail(self, reason: FailureReason, detail: str) -> list[Action]:
        return self._over(Failure(reason=reason, detail=detail[:500]))

    def _over(self, outcome: Outcome) -> list[Action]:
        self._waits_for = None
        self._request_id = ""
        return [End(outcome)]


def turn_seed(ticket_seed: int, turn: int) -> int:
    """Seed of one turn: the same for every attempt, whatever interrupts it; below 2^63."""
    digest = hashlib.blake2b(f"{ticket_seed}/{turn}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _flaw(sampled: SampledTokens, left: int, min_version: int, done: bool) -> str:
    """What makes an answer unusable, or nothing."""
    count = sampled.token_ids.shape[0]
    if sampled.token_ids.dtype != "i4" or sampled.logprobs.dtype != "f4":
        return "answered with tokens or log-probs of a wrong dtype"
    if count > left or (done and not count):
        return f"answered {count} tokens where 1 to {left} were asked for"
    if any(span.start >= span.stop for span in sampled.spans):
        return "answered with an empty version span"
    if any(span.version < min_version for span in sampled.spans):
        return f"sampled below version {min_version}"
    if not np.isfinite(sampled.logprobs.numpy()).all():
        return "answered with a log-prob that is no number"
    return ""
