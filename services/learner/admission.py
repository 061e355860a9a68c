"""Admission: how many groups may be in flight, and when a step may start.

Pure state, no clock, no IO. The derivation is in docs/staleness.md; the figures it guarantees are
held by simulation in tests/learner/test_admission.py.

P groups are trained per version, η is the largest allowed staleness in versions, v the newest
published version. A group *issued* at version u is trained in time when the step that consumes it
starts from a version <= u + η.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass
class Admission:
    """Counts whole groups: outstanding ones by issue version, and those trained since v."""

    groups_per_version: int
    """P."""
    max_staleness: int
    """η."""
    max_outstanding: int | None = None
    """A tighter bound on groups in flight, for less staleness at some idle time."""
    version: int = 0
    """v."""
    trained_since_publication: int = 0
    outstanding: dict[str, int] = field(default_factory=dict[str, int])
    """Group id -> issue version; a group leaves when it is trained, dropped or failed."""

    def num_to_issue(self) -> int:
        """Groups that may be issued now: outstanding + trained + n <= P·(η+1)."""
        bound = self.groups_per_version * (self.max_staleness + 1) - self.trained_since_publication
        if self.max_outstanding is not None:
            bound = min(bound, self.max_outstanding)
        return max(0, bound - len(self.outstanding))

    def issue(self, group_id: str) -> None:
        """Count a group issued at the current version."""
        assert group_id not in self.outstanding
        self.outstanding[group_id] = self.version

    def release(self, group_ids: Iterable[str], *, trained: bool) -> None:
        """Take groups out: dropped and failed ones make room now, trained ones at publication."""
        for group_id in group_ids:
            del self.outstanding[group_id]
            self.trained_since_publication += trained

    def publish(self, version: int) -> None:
        """Advance to a newly published version."""
        assert version == self.version + 1
        self.version = version
        self.trained_since_publication = 0

    def oldest_outstanding(self) -> int:
        """Lowest issue version in flight; the current version when nothing is."""
        return min(self.outstanding.values(), default=self.version)

    def choose(self, ready: Iterable[str], *, hold: bool = True) -> tuple[str, ...]:
        """Return the next batch: the P oldest ready groups, or () when a step may not start.

        Ties are broken by group id so that the choice depends on the set alone.

        Args:
            ready: ids of complete groups.
            hold: apply the hold rule; False for `on_stale: mask | drop`.
        """
        ready = set(ready)
        oldest_first = sorted(ready, key=lambda group: (self.outstanding[group], group))
        batch = tuple(oldest_first[: self.groups_per_version - self.trained_since_publication])
        if len(batch) + self.trained_since_publication < self.groups_per_version:
            return ()
        # With nothing left to wait for a hold could not end (P or η were lowered on restart):
        # the step starts, and what is over age is masked.
        can_wait = any(group not in ready for group in self.outstanding)
        return () if hold and can_wait and self.held_by(batch) is not None else batch

    def held_by(self, batch: Iterable[str]) -> int | None:
        """Return the issue version whose groups forbid training `batch` now, or None.

        For every u in [v-η, v], groups issued at <= u that remain after this step must find a
        place in the versions up to u + η: the free places of this version plus P per version.
        """
        chosen = set(batch)
        remaining = [u for group, u in self.outstanding.items() if group not in chosen]
        free = self.groups_per_version - self.trained_since_publication - len(chosen)
        for u in range(self.version - self.max_staleness, self.version + 1):
            places = free + self.groups_per_version * (u + self.max_staleness - self.version)
            if sum(issued <= u for issued in remaining) > places:
                return u
        return None

    def over_age(self, ready: Iterable[str]) -> tuple[str, ...]:
        """Return the ready groups whose tokens may be older than η (for `on_stale: drop`)."""
        return tuple(g for g in ready if self.version - self.outstanding[g] > self.max_staleness)
