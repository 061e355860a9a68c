"""Which versions are held and how one becomes another: a forest of versions and links. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

P = TypeVar("P")
"""What leads along a link, both ways."""


@dataclass(frozen=True, slots=True)
class Hop(Generic[P]):
    """One link of a path."""

    frm: int
    to: int
    payload: P
    reverse: bool
    """The payload leads from `to` to `frm`: take it back."""


@dataclass(frozen=True, slots=True)
class Dropped(Generic[P]):
    """What is gone: its payloads are the caller's to close."""

    versions: frozenset[int]
    payloads: tuple[P, ...]


class Lineage(Generic[P]):
    """Versions, and links that lead from one to another and back.

    There is at most one path between two versions; versions without any are in different trees.
    """

    def __init__(self) -> None:
        self._links: dict[int, dict[int, Hop[P]]] = {}
        """version -> neighbour -> the hop to it."""

    def __contains__(self, version: object) -> bool:
        return version in self._links

    def __len__(self) -> int:
        return len(self._links)

    @property
    def versions(self) -> tuple[int, ...]:
        """Ascending."""
        return tuple(sorted(self._links))

    @property
    def payloads(self) -> Iterator[P]:
        """Of every link, once."""
        for hops in self._links.values():
            yield from (hop.payload for hop in hops.values() if not hop.reverse)

    def add(self, version: int) -> None:
        """Add a version that nothing leads to; one that is there stays as it is."""
        self._links.setdefault(version, {})

    def link(self, a: int, b: int, payload: P) -> None:
        """Let `payload` lead from `a` to `b`; both are there.

        Raises:
            ValueError: one is not there, or there is a path already.
        """
        if a not in self._links or b not in self._links or self.path(a, b) is not None:
            raise ValueError(f"versions {a} and {b} cannot be linked")
        self._links[a][b] = Hop(a, b, payload, reverse=False)
        self._links[b][a] = Hop(b, a, payload, reverse=True)

    def path(self, a: int, b: int) -> list[Hop[P]] | None:
        """Return the hops from `a` to `b`, none when they are the same; None: not connected."""
        if a not in self._links or b not in self._links:
            return None
        came_by = self._walk(b)
        if a not in came_by:
            return None
        hops: list[Hop[P]] = []
        while a != b:
            hop = self._links[a][came_by[a]]
            hops.append(hop)
            a = hop.to
        return hops

    def prune(self, keep: Container[int]) -> Dropped[P]:
        """Drop the leaves that are not in `keep`, and what becomes one by that.

        What is left and not in `keep` lies between versions that are.
        """
        leaves = deque(v for v, hops in self._links.items() if len(hops) < 2 and v not in keep)
        versions: set[int] = set()
        payloads: list[P] = []
        while leaves:
            leaf = leaves.popleft()
            versions.add(leaf)
            for neighbour, hop in self._links.pop(leaf).items():
                payloads.append(hop.payload)
                hops = self._links[neighbour]
                del hops[leaf]
                if len(hops) == 1 and neighbour not in keep:
                    leaves.append(neighbour)
        return Dropped(frozenset(versions), tuple(payloads))

    def keep_tree_of(self, version: int) -> Dropped[P]:
        """Drop everything that is not connected to `version`."""
        gone = frozenset(self._links) - set(self._walk(version))
        payloads = tuple(
            hop.payload for v in gone for hop in self._links[v].values() if not hop.reverse
        )
        for v in gone:
            del self._links[v]
        return Dropped(gone, payloads)

    def cut(self, a: int, b: int) -> P:
        """Remove the link between neighbours; return its payload.

        Raises:
            KeyError: they are not neighbours.
        """
        del self._links[b][a]
        return self._links[a].pop(b).payload

    def _walk(self, start: int) -> dict[int, int]:
        """Return every version connected to `start` and its neighbour on the way there."""
        came_by = {start: start} if start in self._links else {}
        ahead = deque(came_by)
        while ahead:
            version = ahead.popleft()
            for neighbour in self._links[version]:
                if neighbour not in came_by:
                    came_by[neighbour] = version
                    ahead.append(neighbour)
        return came_by
