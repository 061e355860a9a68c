"""Snapshots of what routes carry from step to step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from shared.backends.base import Snapshot


@dataclass(frozen=True)
class Nested:
    """Snapshots in folders of their own, one beside all of them; both may be missing."""

    folders: Mapping[str, Snapshot]
    beside: tuple[Snapshot, ...] = ()

    def write(self, folder: Path) -> None:
        for snapshot in self.beside:
            snapshot.write(folder)
        for name, snapshot in self.folders.items():
            own = folder / name
            own.mkdir()
            snapshot.write(own)


NOTHING = Nested({})
"""Of a route that carries nothing."""
