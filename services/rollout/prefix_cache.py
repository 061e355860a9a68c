"""Which KV slot belongs to whom: running turns, finished prefixes kept for reuse, free. Pure.

A multi-turn episode comes back with the ids of its last turn plus an observation: the slot of
that turn already holds the keys and values of the prefix, and only the rest is forwarded.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

KEY_TOKENS = 16
"""Kept prefixes are found by their first tokens; shorter ones are not worth keeping."""

_ITEM = array("i").itemsize


@dataclass(frozen=True, slots=True)
class Lease:
    """A slot for a turn that starts."""

    slot: int
    reused: int
    """Tokens at the start of the turn whose keys and values the slot already holds."""


class PrefixCache:
    """Slots and what they hold, all of one weight version.

    A slot is in exactly one state: free, held by a running turn, or kept with a finished prefix.
    Kept ones are given up in least-recently-used order when a turn needs a slot.
    """

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.evictions = 0
        self._free = list(range(num_slots - 1, -1, -1))
        self._kept: OrderedDict[int, bytes] = OrderedDict()
        """Slot -> ids, oldest first."""
        self._by_key: dict[bytes, list[int]] = {}

    @property
    def num_used(self) -> int:
        """Slots that hold live keys and values, kept ones included."""
        return self.num_slots - len(self._free)

    @property
    def num_kept(self) -> int:
        return len(self._kept)

    def acquire(self, token_ids: Sequence[int]) -> Lease | None:
        """Lease a slot for a turn over `token_ids`, the longest kept prefix if there is one.

        The last token is never counted as reused: it has to be forwarded to get logits.
        Returns None when every slot is held by a running turn.
        """
        slot = self._longest_prefix(_as_bytes(token_ids))
        if slot is not None:
            reused = len(self._forget(slot)) // _ITEM
            return Lease(slot, min(reused, len(token_ids) - 1))
        if self._free:
            return Lease(self._free.pop(), 0)
        if self._kept:
            self.evictions += 1
            oldest = next(iter(self._kept))
            self._forget(oldest)
            return Lease(oldest, 0)
        return None

    def release(self, slot: int, token_ids: Sequence[int]) -> None:
        """Give a slot back, holding the keys and values of exactly `token_ids`."""
        if len(token_ids) < KEY_TOKENS:
            self._free.append(slot)
            return
        ids = _as_bytes(token_ids)
        self._kept[slot] = ids
        self._by_key.setdefault(_key(ids), []).append(slot)

    def drop_kept(self) -> int:
        """Forget every kept prefix (the weights changed); return how many there were."""
        dropped = len(self._kept)
        self._free.extend(self._kept)
        self._kept.clear()
        self._by_key.clear()
        return dropped

    def _longest_prefix(self, ids: bytes) -> int | None:
        candidates = self._by_key.get(_key(ids), ())
        fitting = [slot for slot in candidates if ids.startswith(self._kept[slot])]
        return max(fitting, key=lambda slot: len(self._kept[slot]), default=None)

    def _forget(self, slot: int) -> bytes:
        ids = self._kept.pop(slot)
        slots = self._by_key[_key(ids)]
        slots.remove(slot)
        if not slots:
            del self._by_key[_key(ids)]
        return ids


def _as_bytes(token_ids: Sequence[int]) -> bytes:
    return array("i", token_ids).tobytes()


def _key(ids: bytes) -> bytes:
    return ids[: KEY_TOKENS * _ITEM]
