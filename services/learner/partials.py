"""What is known of episodes in progress: their tokens so far, and the scores of those tokens.

Pure. A token is known by (ticket, attempt, sequence, position) and by the digest of the tokens up
to the last position scored with it: a number is joined with exactly the prefix it was computed for.

    partial of an attempt -> pieces stamped v -> scored at the fence of v -> TokenScores
    terminal of the same attempt -> its pieces: joined, scored now, or unscorable for good
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from shared.backends.trajectory_scoring import Piece
from shared.wire.base import Array, DType
from shared.wire.codec import content_digest
from shared.wire.fencing import PartialScores, PartialTrajectory, TokenScores

Attempt = tuple[str, str]
"""(ticket id, attempt id)"""


@dataclass(frozen=True, slots=True)
class Known:
    """Old log-probs of one piece."""

    logprobs: npt.NDArray[np.floating[Any]]
    digest: str
    """Of the version."""


@dataclass(frozen=True, slots=True)
class _Entry:
    seq: int
    digest: str
    scores: TokenScores


class PartialBook:
    """Partials and partial scores of open tickets, in memory as on the `partials` stream."""

    def __init__(self) -> None:
        self._partials: dict[Attempt, tuple[int, PartialTrajectory]] = {}
        """With the sequence of the record; the longest of an attempt."""
        self._scores: dict[Attempt, list[_Entry]] = {}

    # --- records in, in any order and any number of times
    def take_partial(self, partial: PartialTrajectory, seq: int) -> None:
        """Keep the longest partial of an attempt."""
        attempt = (partial.ticket_id, partial.attempt_id)
        held = self._partials.get(attempt)
        if held is None or _num_tokens(held[1]) <= _num_tokens(partial):
            self._partials[attempt] = (seq, partial)

    def take_scores(self, record: PartialScores, seq: int) -> None:
        """Keep scores; of the same tokens twice, either will do."""
        for scores in record.scores:
            attempt = (scores.ticket_id, scores.attempt_id)
            self._scores.setdefault(attempt, []).append(_Entry(seq, record.digest, scores))

    def keep_only(self, open_tickets: Collection[str], before_version: int) -> None:
        """Forget closed tickets, and partials that hold nothing from `before_version` on.

        Args:
            open_tickets: issued and not settled.
            before_version: the version being left: its tokens are scored or lost.
        """
        self._scores = {a: e for a, e in self._scores.items() if a[0] in open_tickets}
        self._partials = {
            attempt: held
            for attempt, held in self._partials.items()
            if attempt[0] in open_tickets and _newest(held[1]) > before_version
        }

    def floor(self, next_seq: int) -> int:
        """Return the lowest sequence of the stream that is still needed."""
        seqs = [seq for seq, _ in self._partials.values()]
        seqs += [entry.seq for entries in self._scores.values() for entry in entries]
        return min(seqs, default=next_seq)

    @property
    def partials(self) -> tuple[PartialTrajectory, ...]:
        """The longest partial of each attempt."""
        return tuple(partial for _, partial in self._partials.values())

    # --- joins
    def known(self, attempt: Attempt, piece: Piece) -> Known | None:
        """Return the log-probs of all of a piece's positions, or None unless all are known."""
        positions: dict[int, float] = {}
        digest = ""
        for entry in self._scores.get(attempt, ()):
            scores = entry.scores
            scored = scores.positions.numpy()
            if scores.sequence != piece.sequence or not np.isin(scored, piece.positions).any():
                continue
            if scores.prefix_digest != prefix_digest(piece.token_ids, scored):
                continue
            digest = entry.digest
            positions |= dict(zip(scored.tolist(), scores.old_logprobs.numpy(), strict=True))
        wanted = piece.positions.tolist()
        if not all(position in positions for position in wanted):
            return None
        return Known(np.array([positions[position] for position in wanted]), digest)


def token_scores(
    attempt: Attempt, piece: Piece, logprobs: npt.NDArray[np.floating[Any]], dtype: DType
) -> TokenScores:
    """Return a scored piece of an episode that goes on, in wire form."""
    return TokenScores(
        ticket_id=attempt[0],
        attempt_id=attempt[1],
        sequence=piece.sequence,
        positions=Array.of(piece.positions, "i4"),
        old_logprobs=Array.of(logprobs, dtype),
        prefix_digest=prefix_digest(piece.token_ids, piece.positions),
    )


def prefix_digest(token_ids: npt.NDArray[np.int32], positions: npt.NDArray[Any]) -> str:
    """Digest of the tokens up to the last of `positions`, empty when there are not so many."""
    stop = int(positions[-1]) + 1
    if stop > len(token_ids):
        return ""
    return content_digest(np.ascontiguousarray(token_ids[:stop], dtype="<i4").tobytes())


def _num_tokens(partial: PartialTrajectory) -> int:
    return sum(sequence.token_ids.shape[0] for sequence in partial.sequences)


def _newest(partial: PartialTrajectory) -> int:
    return max(
        (span.version for sequence in partial.sequences for span in sequence.spans), default=-1
    )
