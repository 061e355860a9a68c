"""What a fence has to score, and what comes of it: completed terminals, scores of partials.

Tokens stamped with the version being left are forwarded now; older ones are joined from earlier
fences. What is neither was handed in too late: no weights are left to score it with.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from services.learner.partials import Attempt, PartialBook, token_scores
from services.learner.staging import TerminalArrived
from shared.algo.batching import balance
from shared.backends.base import Backend
from shared.backends.expert_layers import ExpertLayers
from shared.backends.objection import objection
from shared.backends.trajectory_scoring import (
    LayoutKind,
    Piece,
    Played,
    TrajectoryScore,
    pieces_of,
    score_dtype,
    score_pieces,
)
from shared.wire.fencing import PartialTrajectory, TokenScores
from shared.wire.trajectory import Trajectory


@dataclass(frozen=True, slots=True)
class Completed:
    """A terminal every stamped token of which has a score, or is known to get none."""

    event: TerminalArrived
    score: TrajectoryScore
    unscorable_tokens: int


@dataclass(slots=True)
class Completion:
    """The result of one fence's scoring."""

    terminals: list[Completed] = field(default_factory=list[Completed])
    partials: list[TokenScores] = field(default_factory=list[TokenScores])
    scored_tokens: int = 0
    """Stamped tokens that got their number now, those of partials included."""
    partial_tokens: int = 0
    forward_tokens: int = 0
    seconds: float = 0.0

    @property
    def unscorable_tokens(self) -> int:
        return sum(one.unscorable_tokens for one in self.terminals)


@dataclass(frozen=True, slots=True)
class _Job:
    """A piece to forward, and where its numbers go."""

    attempt: Attempt
    piece: Piece
    target: tuple[TrajectoryScore, int] | None
    """None: of a partial."""


@dataclass(frozen=True)
class Completer:
    """Scores under the weights that `backend` holds."""

    backend: Backend
    num_vocab: int
    layout: LayoutKind
    temperature: float
    pack_tokens: int
    experts: ExpertLayers | None = None
    """What recorded routing is replayed."""

    def complete(
        self,
        terminals: Sequence[TerminalArrived],
        partials: Sequence[PartialTrajectory],
        book: PartialBook,
        *,
        version: int,
        digest: str,
    ) -> Completion:
        """Score all that `version` sampled.

        Args:
            terminals: trajectories without a score.
            partials: of episodes that go on; those that ended meanwhile are left out here.
            book: scores of earlier fences.
            version: the version that `backend` holds.
            digest: its digest.
        """
        started = time.perf_counter()
        result = Completion()
        jobs: list[_Job] = []
        ended = {(event.ticket_id, event.attempt_id) for event in terminals}
        for event in terminals:
            completed, missing = self._join(event, book, version)
            result.terminals.append(completed)
            jobs += missing
        for partial in partials:
            attempt = (partial.ticket_id, partial.attempt_id)
            if attempt not in ended:
                jobs += self._of_partial(attempt, partial, book, version)
        self._forward(jobs, result, digest)
        result.seconds = time.perf_counter() - started
        return result

    def _join(
        self, event: TerminalArrived, book: PartialBook, version: int
    ) -> tuple[Completed, list[_Job]]:
        trajectory = event.outcome
        assert isinstance(trajectory, Trajectory)
        attempt = (event.ticket_id, event.attempt_id)
        pieces = self._pieces(trajectory)
        score = TrajectoryScore(trajectory, pieces, self.backend.dtype)
        fits = not objection(trajectory, self.num_vocab, self.experts)
        jobs: list[_Job] = []
        lost = 0
        for index, piece in enumerate(pieces):
            known = book.known(attempt, piece)
            if not fits or (known is None and piece.version != version):
                lost += score.give_up(index)
            elif known is None:
                jobs.append(_Job(attempt, piece, (score, index)))
            else:
                score.settle(
                    index, known.logprobs, verified=True, digest=known.digest, compute_s=0.0
                )
        return Completed(event, score, lost), jobs

    def _of_partial(
        self, attempt: Attempt, partial: PartialTrajectory, book: PartialBook, version: int
    ) -> list[_Job]:
        if objection(partial, self.num_vocab, self.experts):
            return []
        return [
            _Job(attempt, piece, None)
            for piece in self._pieces(partial)
            if piece.version == version and book.known(attempt, piece) is None
        ]

    def _pieces(self, played: Played) -> tuple[Piece, ...]:
        return pieces_of(
            played,
            kind=self.layout,
            temperature=self.temperature,
            replays=self.experts is not None,
        )

    def _forward(self, jobs: list[_Job], result: Completion, digest: str) -> None:
        dtype = score_dtype(self.backend.dtype)
        for pack in balance([len(job.piece.token_ids) for job in jobs], self.pack_tokens):
            chosen = [jobs[index] for index in pack]
            started = time.perf_counter()
            values = score_pieces(self.backend, [job.piece for job in chosen], self.layout)
            share_s = (time.perf_counter() - started) / len(chosen)
            for job, logprobs in zip(chosen, values, strict=True):
                result.scored_tokens += len(job.piece.positions)
                result.forward_tokens += len(job.piece.token_ids)
                if job.target is None:
                    result.partial_tokens += len(job.piece.positions)
                    result.partials.append(token_scores(job.attempt, job.piece, logprobs, dtype))
                else:
                    score, index = job.target
                    score.settle(index, logprobs, verified=True, digest=digest, compute_s=share_s)
