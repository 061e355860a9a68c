"""Forwards of whole trajectories under one set of weights, and scores made of plain arrays.

Shapes: T tokens of one sequence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from services.learner.staging import Scored
from shared.algo.batching import balance
from shared.backends.base import Backend
from shared.backends.trajectory_scoring import Piece, score_pieces, whole_pieces
from shared.wire.base import Array, DType
from shared.wire.messages import SequenceScore, VersionScore
from shared.wire.trajectory import Trajectory

Logprobs = list[npt.NDArray[np.floating[Any]]]
"""One array [T] per sequence of a trajectory; 0 where nothing was sampled."""


def forward_members(
    backend: Backend,
    members: Sequence[Scored],
    *,
    temperature: float,
    pack_tokens: int,
    replay: bool = True,
) -> tuple[dict[str, Logprobs], int]:
    """Forward every trajectory once under the weights that `backend` holds.

    Args:
        backend: the model.
        members: trajectories.
        temperature: of turns that carry no sampling parameters of their own.
        pack_tokens: most tokens of a forward.
        replay: take the experts that the sampler took, where it recorded them.

    Returns:
        Log-probs of the sampled tokens by ticket id, and the tokens forwarded.
    """
    owners: list[str] = []
    pieces: list[Piece] = []
    results: dict[str, Logprobs] = {}
    for member in members:
        results[member.ticket_id] = [
            np.zeros(sequence.token_ids.shape[0], dtype=np.float64)
            for sequence in member.trajectory.sequences
        ]
        for piece in whole_pieces(member.trajectory, temperature=temperature):
            owners.append(member.ticket_id)
            pieces.append(piece if replay else dataclasses.replace(piece, records=()))
    for pack in balance([len(piece.token_ids) for piece in pieces], pack_tokens):
        chosen = [pieces[index] for index in pack]
        for index, logprobs in zip(pack, score_pieces(backend, chosen, "packed"), strict=True):
            piece = pieces[index]
            results[owners[index]][piece.sequence][piece.positions] = logprobs
    return results, sum(len(piece.token_ids) for piece in pieces)


def sampler_logprobs(trajectory: Trajectory) -> Logprobs:
    """Return what the engine recorded when it sampled, 0 elsewhere."""
    return [
        np.where(
            sequence.loss_mask.numpy().astype(bool),
            sequence.arrays["sampler_logprobs"].numpy().astype(np.float64),
            0.0,
        )
        for sequence in trajectory.sequences
    ]


def as_scores(
    trajectory: Trajectory,
    logprobs: Logprobs,
    dtype: DType,
    status: Mapping[int, Literal["exact", "approximate", "unverified"]] | None = None,
) -> tuple[SequenceScore, ...]:
    """Return arrays in wire form; the provenance of every version is `approximate` by default."""
    scores: list[SequenceScore] = []
    for sequence, values in zip(trajectory.sequences, logprobs, strict=True):
        versions = sorted({span.version for span in sequence.spans})
        scores.append(
            SequenceScore(
                old_logprobs=Array.of(values, dtype),
                versions=tuple(
                    VersionScore(version=v, status=(status or {}).get(v, "approximate"))
                    for v in versions
                ),
            )
        )
    return tuple(scores)
