"""All tokens of an episode: one growing sequence, or several where histories were rewritten."""

from __future__ import annotations

from collections.abc import Sequence as Ids
from dataclasses import dataclass, field

from services.env_agents.sequence_builder import SequenceBuilder
from shared.wire.trajectory import Sequence, Turn


@dataclass(slots=True)
class _Part:
    builder: SequenceBuilder
    parent: int | None
    turns: list[Turn] = field(default_factory=list[Turn])
    handed_in: int = 0
    """Tokens of the newest partial."""
    wire: Sequence | None = None
    """Once nothing is appended any more."""

    def build(self) -> Sequence:
        return self.builder.build(self.turns, self.parent)


class EpisodeTokens:
    """Tokens are appended to the newest sequence; earlier ones stay as they are.

    Args:
        capacity: most tokens of one sequence.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._parts = [_Part(SequenceBuilder(capacity), None)]
        self.num_turns = 0
        """Of all sequences."""

    @property
    def current(self) -> SequenceBuilder:
        """The sequence that grows."""
        return self._parts[-1].builder

    def begin(self, ids: Ids[int], *, continues: bool) -> None:
        """Start a further sequence with another history; the caller has looked at the capacity."""
        last = self._parts[-1]
        last.wire = last.build()
        parent = len(self._parts) - 1 if continues else None
        self._parts.append(_Part(SequenceBuilder(self._capacity), parent))
        self.current.append_context(ids)

    def close_turn(self, turn: Turn) -> None:
        """Note an answer of the newest sequence."""
        self._parts[-1].turns.append(turn)
        self.num_turns += 1

    def build(self) -> tuple[Sequence, ...]:
        """Return everything so far in wire form."""
        return tuple(part.wire or part.build() for part in self._parts)

    def partial(self, below: int) -> tuple[Sequence, ...] | None:
        """Return everything if a token below version `below` is new since the last time."""
        if not any(
            span.version < below and span.stop > part.handed_in
            for part in self._parts
            for span in part.builder.spans
        ):
            return None
        for part in self._parts:
            part.handed_in = len(part.builder)
        return self.build()
