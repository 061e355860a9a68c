"""Checkpoints: written beside, renamed into place, the newest readable one wins."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from shared.runtime.errors import Fatal
from shared.runtime.logs import Log

_FACTS = "learner.json"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path
    version: int
    digest: str
    """Of the policy version it holds; checked after loading."""
    optimizer_steps: int
    floors: dict[str, int]
    """Stream -> lowest sequence that a replay from here may still need."""


class Saves(Protocol):
    """Something with state: the backend, the old-logit route."""

    def save(self, path: Path, /) -> None:
        """Write files of its own into an existing folder."""
        ...


class CheckpointStore:
    """The checkpoints of one run."""

    def __init__(self, folder: Path, keep: int, log: Log) -> None:
        self._folder = folder
        self._keep = keep
        self._log = log
        self._known: list[Checkpoint] | None = None

    def save(
        self,
        parts: Sequence[Saves],
        *,
        version: int,
        digest: str,
        optimizer_steps: int,
        floors: dict[str, int],
    ) -> Checkpoint:
        """Write a checkpoint atomically and delete the ones beyond `keep`.

        Raises:
            Fatal: the disk is full or not writable; nothing half-written is left in place.
        """
        final = self._folder / f"v{version:06d}"
        partial = self._folder / f".v{version:06d}.partial"
        facts = {
            "version": version,
            "digest": digest,
            "optimizer_steps": optimizer_steps,
            "floors": floors,
        }
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            for part in parts:
                part.save(partial)
            (partial / _FACTS).write_text(json.dumps(facts))
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            reason = error.strerror or str(error)
            raise Fatal(f"checkpoint {final}: {reason}: free some space and restart") from error
        saved = Checkpoint(final, version, digest, optimizer_steps, floors)
        known = [c for c in self.all() if c.version < version] + [saved]
        for old in known[: -self._keep]:
            shutil.rmtree(old.path, ignore_errors=True)
        self._known = known[-self._keep :]
        return saved

    def all(self) -> list[Checkpoint]:
        """Return the complete checkpoints, oldest first, as of the start and what was saved since.

        Damaged ones are skipped and logged.
        """
        if self._known is None:
            self._known = self._read()
        return list(self._known)

    def _read(self) -> list[Checkpoint]:
        found: list[Checkpoint] = []
        for path in sorted(self._folder.glob("v[0-9]*")):
            try:
                facts = json.loads((path / _FACTS).read_text())
                found.append(
                    Checkpoint(
                        path,
                        int(facts["version"]),
                        str(facts["digest"]),
                        int(facts["optimizer_steps"]),
                        {str(k): int(v) for k, v in facts["floors"].items()},
                    )
                )
            except (OSError, ValueError, KeyError) as error:
                self._log.warning("checkpoint_skipped", path=str(path), reason=str(error))
        return found
