"""What happens to an episode and what it does about it: the vocabulary of `episodes.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from shared.wire.messages import Behind, Done, Partial, Refused, SampleRequest
from shared.wire.trajectory import Outcome

# --- events


@dataclass(frozen=True, slots=True)
class Started:
    """The ticket was accepted."""


@dataclass(frozen=True, slots=True)
class Observed:
    """The environment was reset."""

    token_ids: Sequence[int]
    task_digest: str
    max_new_tokens: int | None = None
    """A tighter bound on the next answer than the ticket's."""


@dataclass(frozen=True, slots=True)
class Replied:
    """A rollout gave its final answer to a request."""

    request_id: str
    pod: str
    body: Behind | Partial | Done | Refused


@dataclass(frozen=True, slots=True)
class Unanswered:
    """A request ended without an answer: nobody listens there, or the pod fell silent."""

    request_id: str
    cause: Literal["no_responders", "silence"]


@dataclass(frozen=True, slots=True)
class Stepped:
    """The environment took an answer."""

    token_ids: Sequence[int]
    """Of the next observation; ignored when the episode ends."""
    reward: float
    terminated: bool
    truncated: bool
    rewards: Mapping[str, float] = field(default_factory=dict[str, float])
    rewrites: bool = False
    """`token_ids` are another history: they begin a further sequence."""
    continues: bool = True
    """The further sequence goes on with the conversation of the last one."""
    max_new_tokens: int | None = None
    """A tighter bound on the next answer than the ticket's."""


@dataclass(frozen=True, slots=True)
class EnvFailed:
    """The environment (or the renderer of its text) raised, hung, or its process went away."""

    reason: Literal["env_error", "env_timeout", "env_lost"]
    detail: str


@dataclass(frozen=True, slots=True)
class DeadlinePassed:
    """The ticket's deadline is over."""


Event = Started | Observed | Replied | Unanswered | Stepped | EnvFailed | DeadlinePassed

# --- actions


@dataclass(frozen=True, slots=True)
class ResetEnv:
    """Reset the environment to the ticket's task."""


@dataclass(frozen=True, slots=True)
class Ask:
    """Request tokens."""

    request: SampleRequest
    pod: str | None
    """The pod that holds the prefix; None: anyone."""
    delay_s: float = 0.0
    """Wait so long first."""


@dataclass(frozen=True, slots=True)
class StepEnv:
    """Hand the policy's answer to the environment."""

    token_ids: list[int]


@dataclass(frozen=True, slots=True)
class End:
    """The episode is over."""

    outcome: Outcome


Action = ResetEnv | Ask | StepEnv | End
