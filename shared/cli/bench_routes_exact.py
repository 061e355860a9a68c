"""The exact answer: every token under its own version, as the oracle service scores it.

The versions come from a ring of copies; pieces, packs and provenance are the oracle's own.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from services.learner.staging import Scored
from shared.algo.batching import balance
from shared.backends.base import Backend
from shared.backends.trajectory_scoring import TrajectoryScore, pieces_of, score_pieces


class Ring:
    """Copies of the newest versions: what the simulated lag samples from."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._states: dict[int, dict[str, torch.Tensor]] = {}

    def put(self, version: int, state: Mapping[str, torch.Tensor]) -> None:
        """Keep a copy; forget the version that is now too old."""
        self._states[version] = {name: value.clone() for name, value in state.items()}
        self._states.pop(version - self._size, None)

    def __getitem__(self, version: int) -> dict[str, torch.Tensor]:
        return self._states[version]


class ExactScorer:
    """Scores batches from a ring, with a model of its own."""

    def __init__(self, backend: Backend, ring: Ring, *, pack_tokens: int) -> None:
        self._backend = backend
        self._ring = ring
        self._pack_tokens = pack_tokens
        self.cpu_s = 0.0
        self.forward_tokens = 0
        self.loads = 0

    def scored(self, members: Sequence[Scored]) -> list[Scored]:
        """Return the members with their exact scores."""
        started = time.process_time()
        scores = [self._empty(member) for member in members]
        work = [
            (score, index, piece) for score in scores for index, piece in enumerate(score.pieces)
        ]
        for version in sorted({piece.version for _, _, piece in work}):
            self._backend.load_state(self._ring[version])
            self.loads += 1
            own = [one for one in work if one[2].version == version]
            for pack in balance([len(piece.token_ids) for _, _, piece in own], self._pack_tokens):
                chosen = [own[index] for index in pack]
                values = score_pieces(self._backend, [piece for _, _, piece in chosen], "packed")
                for (score, index, _), logprobs in zip(chosen, values, strict=True):
                    score.settle(index, logprobs, verified=True, digest="", compute_s=0.0)
        self.forward_tokens += sum(score.forward_tokens for score in scores)
        self.cpu_s += time.process_time() - started
        return [
            replace(member, scores=score.sequences())
            for member, score in zip(members, scores, strict=True)
        ]

    def _empty(self, member: Scored) -> TrajectoryScore:
        pieces = pieces_of(member.trajectory, kind="packed", temperature=1.0)
        return TrajectoryScore(member.trajectory, pieces, self._backend.dtype)
