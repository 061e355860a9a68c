"""What every route must give: per token an old log-prob, its provenance, its cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from services.learner.staging import ScoreArrived, Scored
from shared.backends.base import Backend
from shared.wire.base import Message
from shared.wire.messages import SequenceScore


class OldLogprobRoute(Protocol):
    """Where the old log-probs of a batch come from.

    A route either waits for scores that another service stores (`waits_for_scores`), or computes
    them when the step begins (`at_step`). A missing version is an error or a tagged, counted
    fallback, never silently the current weights.
    """

    name: str
    exact: bool
    waits_for_scores: bool

    def scores_message(self) -> type[Message]:
        """Type of the records on the `scores` stream."""
        ...

    def arrived(self, message: Message, seq: int) -> ScoreArrived:
        """Turn a stored record into staging's event."""
        ...

    def at_step(
        self, members: Sequence[Scored], backend: Backend, version: int
    ) -> dict[str, tuple[SequenceScore, ...]]:
        """Compute old log-probs by ticket id, before the first optimizer step leaves `version`."""
        ...
