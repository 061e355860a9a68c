"""Scoring a pack on several data-parallel ranks: each forwards its sequences. Pure.

Shapes: T tokens of a packed batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from shared.algo.batching import PackedBatch, hollow, share


def scored_by(lengths: Sequence[int], share_: int, shares: int) -> list[int]:
    """Return the sequences that one data-parallel share forwards, ascending; [] for none.

    All ranks compute the same division. One sequence alone is forwarded by all: there is nothing
    to win, and every rank has what it would have alone.
    """
    if shares == 1 or len(lengths) == 1:
        return list(range(len(lengths)))
    [mine] = share(lengths, sum(lengths), shares)[share_]
    return sorted(mine)


def part_of(batch: PackedBatch, sequences: Sequence[int]) -> PackedBatch:
    """Return a pack of the chosen sequences; of none, one token that is not scored."""
    if not sequences:
        return hollow(batch)
    if len(sequences) == len(batch.lengths):
        return batch
    rows_T = torch.cat([_rows(batch, index) for index in sequences])
    return PackedBatch(
        token_ids_T=batch.token_ids_T[rows_T],
        positions_T=batch.positions_T[rows_T],
        lengths=tuple(batch.lengths[index] for index in sequences),
        per_token={name: values_T[rows_T] for name, values_T in batch.per_token.items()},
    )


def whole(batch: PackedBatch, parts: Mapping[int, torch.Tensor], shares: int) -> torch.Tensor:
    """Return logprobs_T of a pack from those of its parts, by data-parallel share."""
    if len(batch.lengths) == 1 or shares == 1:
        return next(iter(parts.values()))
    logprobs_T = torch.zeros(batch.num_tokens, dtype=next(iter(parts.values())).dtype)
    for share_, values in parts.items():
        sequences = scored_by(batch.lengths, share_, shares)
        if sequences:
            logprobs_T[torch.cat([_rows(batch, index) for index in sequences])] = values
    return logprobs_T


def _rows(batch: PackedBatch, sequence: int) -> torch.Tensor:
    first = sum(batch.lengths[:sequence])
    return torch.arange(first, first + batch.lengths[sequence])
