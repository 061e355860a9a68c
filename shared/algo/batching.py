"""Packed batches: variable-length sequences laid end to end, and how they are balanced.

Shapes: T tokens of the packed batch, B sequences in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch


@dataclass(frozen=True)
class PackedBatch:
    """Sequences laid end to end without padding."""

    token_ids_T: torch.Tensor
    """i64."""
    positions_T: torch.Tensor
    """i64: position inside the own sequence, from 0."""
    lengths: tuple[int, ...]
    """Length of each of the B sequences, in order; they sum to T."""
    per_token: dict[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])
    """Further tensors [T, ...] that travel with the tokens: loss_mask, advantages, routing, ..."""

    @property
    def num_tokens(self) -> int:
        return int(self.token_ids_T.shape[0])

    def split(self, values_T: torch.Tensor) -> list[torch.Tensor]:
        """Cut a [T] tensor back into its B sequences."""
        return list(torch.split(values_T, list(self.lengths)))


def pack(
    token_ids: Sequence[np.ndarray | torch.Tensor],
    per_token: Mapping[str, Sequence[np.ndarray | torch.Tensor]] | None = None,
) -> PackedBatch:
    """Lay sequences end to end, in the given order.

    Args:
        token_ids: B integer arrays [T_i], each of at least one token.
        per_token: by name, B arrays of the same lengths.

    Raises:
        ValueError: an empty sequence, or a per-token array of another length.
    """
    lengths = tuple(len(ids) for ids in token_ids)
    if not lengths or min(lengths) == 0:
        raise ValueError("pack needs at least one sequence, none of them empty")
    extra: dict[str, torch.Tensor] = {}
    for name, arrays in (per_token or {}).items():
        if tuple(len(a) for a in arrays) != lengths:
            raise ValueError(f"per-token array {name!r} does not match the sequence lengths")
        extra[name] = _joined(arrays)
    return PackedBatch(
        token_ids_T=_joined(token_ids).long(),
        positions_T=_joined([np.arange(n, dtype=np.int64) for n in lengths]),
        lengths=lengths,
        per_token=extra,
    )


def hollow(like: PackedBatch) -> PackedBatch:
    """Return a pack of one token that carries no loss: a forward that a rank only takes part in."""
    per_token = {name: values_T[:1].clone() for name, values_T in like.per_token.items()}
    mask_T = like.per_token.get("loss_mask", like.token_ids_T)
    return PackedBatch(
        token_ids_T=like.token_ids_T[:1].clone(),
        positions_T=torch.zeros_like(like.positions_T[:1]),
        lengths=(1,),
        per_token={**per_token, "loss_mask": torch.zeros_like(mask_T[:1])},
    )


def _joined(arrays: Sequence[np.ndarray | torch.Tensor]) -> torch.Tensor:
    """Concatenate into memory of its own; numpy does so without a tensor per sequence."""
    return torch.from_numpy(np.concatenate([np.asarray(a) for a in arrays]))


def balance(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Group sequence indices into packs of at most `max_tokens`, longest first (first fit).

    A sequence longer than `max_tokens` gets a pack of its own. Deterministic.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    packs: list[list[int]] = []
    totals: list[int] = []
    for index in order:
        for number, total in enumerate(totals):
            if total + lengths[index] <= max_tokens:
                packs[number].append(index)
                totals[number] += lengths[index]
                break
        else:
            packs.append([index])
            totals.append(lengths[index])
    return packs


def share(lengths: Sequence[int], max_tokens: int, ranks: int) -> list[list[list[int]]]:
    """Give every rank its packs of one optimizer step: tokens balanced, equally many packs.

    Sequences go, longest first, to the rank with the fewest tokens, so that ranks differ by at
    most one sequence; each rank then packs its own (`balance`). Ranks work in lockstep: one with
    fewer packs splits its largest, and where it has no two sequences left to part, an empty pack
    stands for the forward that it takes part in without tokens of its own. Deterministic: every
    rank computes the whole division from the same lengths. With one rank it is `balance`.

    Returns:
        By rank, packs of sequence indices.

    Raises:
        ValueError: no ranks.
    """
    if ranks < 1:
        raise ValueError(f"share needs at least one rank, not {ranks}")
    if ranks == 1:
        return [balance(lengths, max_tokens)]
    members: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        rank = min(range(ranks), key=lambda r: (loads[r], r))
        members[rank].append(index)
        loads[rank] += lengths[index]
    shares: list[list[list[int]]] = []
    for mine in members:
        packs = balance([lengths[index] for index in mine], max_tokens)
        shares.append([[mine[position] for position in pack] for pack in packs])
    num_packs = max(len(packs) for packs in shares)
    for packs in shares:
        while len(packs) < num_packs:
            packs.append(_split_largest(packs, lengths))
    return shares


def _split_largest(packs: list[list[int]], lengths: Sequence[int]) -> list[int]:
    """Take every other sequence from the pack with the most tokens; [] when all are single."""
    splittable = [pack for pack in packs if len(pack) > 1]
    if not splittable:
        return []
    largest = max(splittable, key=lambda pack: sum(lengths[index] for index in pack))
    taken = largest[1::2]
    del largest[1::2]
    return taken
