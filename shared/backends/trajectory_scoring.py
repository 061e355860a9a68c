"""From stamped tokens to old log-probs: what to forward, and where the numbers belong.

A token stamped v is scored with its *entire* prefix processed by version v (`offpolicy.md` 9.3);
only stamped positions receive a number. Shapes: T tokens of one sequence.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch

from shared.algo.batching import pack
from shared.algo.version_scoring import parts_by_version
from shared.backends.base import Backend
from shared.backends.routing import ROUTING, Rows, not_recorded, routing_rows
from shared.wire.base import Array, DType
from shared.wire.messages import SequenceScore, VersionScore
from shared.wire.trajectory import RoutingRecord, Sequence, Trajectory, recorded_stop

LayoutKind = Literal["packed", "single"]
Status = Literal["exact", "unverified", "approximate", "unscorable"]

_WORST: tuple[Status, ...] = ("exact", "unverified", "approximate", "unscorable")


class Played(Protocol):
    """A trajectory, or what there is of one in progress."""

    @property
    def sequences(self) -> Many[Sequence]: ...


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """One part's forward: one version, one temperature, one sequence."""

    sequence: int
    """Index in the trajectory."""
    version: int
    temperature: float
    token_ids: npt.NDArray[np.int32]
    """What to forward: the prefix up to the version's last token, or the whole sequence."""
    positions: npt.NDArray[np.int64]
    """Stamped positions whose log-prob is wanted, ascending."""
    can_be_exact: bool
    """False: the tokens were sampled over a KV cache of older weights, or from a truncated
    distribution, or experts were chosen that nobody recorded, so that no forward of this version is
    their training-side twin."""
    records: tuple[RoutingRecord, ...] = ()
    """Of the whole sequence. Rows are made of them when the piece is forwarded: an oracle holds
    many pieces that wait, and all versions' rows are several times what was recorded."""

    @property
    def routing(self) -> Rows | None:
        """[len(token_ids), L, K]: experts to take; None leaves them to the router."""
        version = None if self.version < 0 else self.version
        return routing_rows(self.records, len(self.token_ids), version)


def pieces_of(
    trajectory: Played, *, kind: LayoutKind, temperature: float, replays: bool = False
) -> tuple[Piece, ...]:
    """Split a trajectory into what has to be forwarded.

    Args:
        trajectory: what was played.
        kind: "packed" forwards prefixes, "single" whole sequences.
        temperature: of turns that carry no sampling parameters of their own.
        replays: whether experts are those that the sampler recorded, or nothing is exact.
    """
    pieces: list[Piece] = []
    for index, sequence in enumerate(trajectory.sequences):
        token_ids = sequence.token_ids.numpy()
        drawn_at, inexact = _drawn_at(sequence, temperature), _inexact(sequence)
        for part in parts_by_version(sequence.spans):
            can_be_exact = inexact is None or not inexact[part.positions].any()
            for shared_temperature, positions in _by_temperature(part.positions, drawn_at):
                last = int(positions[-1])
                stop = len(token_ids) if kind == "single" else last + 1
                # Rows of the tokens that are context of a scored one.
                stop_recorded = recorded_stop(sequence.routing, part.version)
                recorded = stop_recorded >= last if sequence.routing else not replays
                pieces.append(
                    Piece(
                        sequence=index,
                        version=part.version,
                        temperature=temperature
                        if shared_temperature is None
                        else shared_temperature,
                        token_ids=token_ids[:stop],
                        positions=positions,
                        can_be_exact=can_be_exact and recorded,
                        records=sequence.routing,
                    )
                )
    return tuple(pieces)


def whole_pieces(trajectory: Trajectory, *, temperature: float) -> tuple[Piece, ...]:
    """Return one piece per sequence (and temperature) with every sampled position in it.

    For weights that are not looked up by version: stamps are not read, `version` is -1.
    """
    pieces: list[Piece] = []
    for index, sequence in enumerate(trajectory.sequences):
        token_ids = sequence.token_ids.numpy()
        sampled = np.flatnonzero(sequence.loss_mask.numpy())
        if not len(sampled):
            continue
        drawn_at = _drawn_at(sequence, temperature)
        for own, positions in _by_temperature(sampled, drawn_at):
            stop = int(positions[-1]) + 1
            pieces.append(
                Piece(
                    sequence=index,
                    version=-1,
                    temperature=temperature if own is None else own,
                    token_ids=token_ids[:stop],
                    positions=positions,
                    can_be_exact=False,
                    records=sequence.routing,
                )
            )
    return tuple(pieces)


def score_dtype(dtype: torch.dtype) -> DType:
    """Return the wire dtype of scores of a model in `dtype`."""
    return "f8" if dtype == torch.float64 else "f4"


def score_pieces(
    backend: Backend, pieces: Many[Piece], kind: LayoutKind
) -> list[npt.NDArray[np.floating[Any]]]:
    """Forward pieces under the weights that the backend holds.

    Returns:
        Per piece the log-probs at its positions, in the backend's score dtype.
    """
    groups: list[list[int]]
    if kind == "single":
        groups = [[index] for index in range(len(pieces))]
    else:
        by_temperature: dict[float, list[int]] = {}
        for index, piece in enumerate(pieces):
            by_temperature.setdefault(piece.temperature, []).append(index)
        groups = list(by_temperature.values())
    values: dict[int, npt.NDArray[np.floating[Any]]] = {}
    for group in groups:
        chosen = [pieces[index] for index in group]
        per_token = {"loss_mask": [_mask(piece) for piece in chosen]} | _routing(chosen)
        batch = pack([piece.token_ids for piece in chosen], per_token)
        logprobs_T = backend.score(batch, temperature=chosen[0].temperature)
        split = batch.split(logprobs_T.cpu())
        for index, piece, logprobs in zip(group, chosen, split, strict=True):
            values[index] = logprobs.numpy()[piece.positions]
    return [values[index] for index in range(len(pieces))]


class TrajectoryScore:
    """Collects one trajectory's log-probs and their provenance."""

    def __init__(
        self, trajectory: Trajectory, pieces: tuple[Piece, ...], dtype: torch.dtype
    ) -> None:
        self._dtype: DType = score_dtype(dtype)
        self._values = [
            np.zeros(sequence.token_ids.shape[0], dtype="<" + self._dtype)
            for sequence in trajectory.sequences
        ]
        self._provenance: list[dict[int, VersionScore]] = [{} for _ in trajectory.sequences]
        self.pieces = pieces
        self.forward_tokens = 0
        self.compute_s = 0.0

    def settle(
        self,
        index: int,
        logprobs: npt.NDArray[np.floating[Any]],
        *,
        verified: bool,
        digest: str,
        compute_s: float,
    ) -> Status:
        """Take the log-probs of piece `index`; return what they count as."""
        piece = self.pieces[index]
        exact = verified and piece.can_be_exact and bool(np.isfinite(logprobs).all())
        status: Status = "exact" if exact else "unverified"
        self._values[piece.sequence][piece.positions] = logprobs
        self.forward_tokens += len(piece.token_ids)
        self.compute_s += compute_s
        self._note(piece, status, digest)
        return status

    def give_up(self, index: int) -> int:
        """Leave piece `index` at zero, its version being gone; return its stamped tokens."""
        piece = self.pieces[index]
        self._note(piece, "unscorable", "")
        return len(piece.positions)

    def substitute(self, index: int, logprobs: npt.NDArray[np.floating[Any]]) -> None:
        """Take numbers of other weights for piece `index`, tagged as such."""
        piece = self.pieces[index]
        self._values[piece.sequence][piece.positions] = logprobs
        self._note(piece, "approximate", "")

    def sequences(self) -> tuple[SequenceScore, ...]:
        """Return the result in wire form."""
        return tuple(
            SequenceScore(
                old_logprobs=Array.of(values, self._dtype),
                versions=tuple(provenance[version] for version in sorted(provenance)),
            )
            for values, provenance in zip(self._values, self._provenance, strict=True)
        )

    def _note(self, piece: Piece, status: Status, digest: str) -> None:
        """Keep the worst status where a version has several pieces in one sequence."""
        provenance = self._provenance[piece.sequence]
        before = provenance.get(piece.version)
        if before is None or _WORST.index(before.status) < _WORST.index(status):
            provenance[piece.version] = VersionScore(
                version=piece.version, status=status, digest=digest
            )


def _routing(pieces: Many[Piece]) -> dict[str, list[npt.NDArray[Any]]]:
    found = [piece.routing for piece in pieces]
    like = next((rows for rows in found if rows is not None), None)
    if like is None:
        return {}
    return {
        ROUTING: [
            not_recorded(len(piece.token_ids), like) if rows is None else rows
            for piece, rows in zip(pieces, found, strict=True)
        ]
    }


def _mask(piece: Piece) -> npt.NDArray[np.uint8]:
    mask = np.zeros(len(piece.token_ids), dtype=np.uint8)
    mask[piece.positions] = 1
    return mask


def _drawn_at(sequence: Sequence, temperature: float) -> npt.NDArray[np.float64] | None:
    """Return the temperature of every token, None when it is the given one throughout."""
    own = [turn for turn in sequence.turns if turn.sampling is not None]
    if all(turn.sampling is None or turn.sampling.temperature == temperature for turn in own):
        return None
    drawn_at = np.full(sequence.token_ids.shape[0], temperature)
    for turn in own:
        assert turn.sampling is not None
        drawn_at[turn.start : turn.stop] = turn.sampling.temperature
    return drawn_at


def _by_temperature(
    positions: npt.NDArray[np.int64], drawn_at: npt.NDArray[np.float64] | None
) -> list[tuple[float | None, npt.NDArray[np.int64]]]:
    if drawn_at is None:
        return [(None, positions)]
    drawn = drawn_at[positions]
    return [(float(t), positions[drawn == t]) for t in np.unique(drawn)]


def _inexact(sequence: Sequence) -> npt.NDArray[np.bool_] | None:
    """Return which tokens have no training-side twin, None when all have one."""
    truncated = [
        (turn.start, turn.stop)
        for turn in sequence.turns
        if turn.sampling is not None and (turn.sampling.top_p < 1 or turn.sampling.top_k)
    ]
    ranges = [(span.start, span.stop) for span in sequence.mixed_kv] + truncated
    if not ranges:
        return None
    inexact = np.zeros(sequence.token_ids.shape[0], dtype=np.bool_)
    for start, stop in ranges:
        inexact[start:stop] = True
    return inexact
