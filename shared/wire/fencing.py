"""Messages of the `interrupt` route: what is in progress when the policy is about to move."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from shared.wire.base import Array, Message, Part
from shared.wire.messages import Layout
from shared.wire.trajectory import Sequence


class PartialTrajectory(Message):
    """Env_agents -> learner: the tokens so far of an episode in progress, handed in at a fence.

    Appended before its sender acknowledges the generation. Idempotent: a later one of the same
    attempt contains every earlier one; tokens that have a score already are not scored again.
    """

    subject: ClassVar[str] = "partial.tokens.<ticket_id>"

    ticket_id: str
    attempt_id: str
    """The terminal of the same attempt begins with these very tokens."""
    generation: int = Field(gt=0)
    producer: str
    incarnation: str
    sequences: tuple[Sequence, ...] = Field(min_length=1)
    """Whole prefixes, tokens of earlier versions included; turns under way have no `Turn` yet."""


class TokenScores(Part):
    """Old log-probs of the tokens that one version stamped in one sequence, as far as it went."""

    ticket_id: str
    attempt_id: str
    sequence: int = Field(ge=0)
    positions: Array
    """i4[N], ascending."""
    old_logprobs: Array
    """f4[N] (f8[N] in float64 runs)."""
    prefix_digest: str
    """Of the token ids up to the last position: the numbers belong to these tokens only."""


class PartialScores(Message):
    """Learner -> learner (later fences, restart): scores of tokens whose episodes go on.

    Appended before the step that leaves `version`. Idempotent: the same tokens may be scored
    twice under one version, with the same result. Joined with the terminal of the same ticket,
    attempt and prefix.
    """

    subject: ClassVar[str] = "partial.scores.<version>"

    version: int = Field(ge=0)
    digest: str
    """The version's digest, from its manifest."""
    scores: tuple[TokenScores, ...]
    layout: Layout
    producer: str


FENCE_GENERATION = "fence_generation"
"""Gauge of an env agent's lease: the newest generation it has acknowledged."""

FENCE_INTERRUPTED = "fence_interrupted"
"""Gauge of an env agent's lease: the turns it interrupted for that generation."""
