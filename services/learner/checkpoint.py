"""Checkpoints of one run: written beside, renamed into place, the newest whole one wins."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from services.learner.checkpoint_files import FACTS_FILE, Checkpoint, Facts, read, seal
from shared.backends.base import Snapshot
from shared.runtime.disk import sync
from shared.runtime.errors import Fatal
from shared.runtime.logs import Log

_NAME = re.compile(r"v\d{6,}")
"""Anything else in the folder is somebody's copy, and none of our business."""


class Carries(Protocol):
    """Something with state: the backend, the old-logit routes."""

    def snapshot(self) -> Snapshot:
        """Copy the state as it is now; one call per checkpoint, on every rank."""
        ...


class CheckpointStore:
    """The folder of checkpoints. `open` it first; one thread at a time."""

    def __init__(self, folder: Path, keep: int, log: Log) -> None:
        self._folder = folder
        self._keep = keep
        self._log = log
        self._run = ""
        self._known: list[Checkpoint] = []
        self._damaged: list[Path] = []

    def open(self, run: str) -> None:
        """Read which checkpoints of `run` there are and drop what a killed process left half-made.

        Damaged ones and those of other runs are skipped and logged.
        """
        self._run = run
        self._known, self._damaged = [], []
        for left in self._folder.glob(".v*.partial"):
            shutil.rmtree(left, ignore_errors=True)
        for path in sorted(p for p in self._folder.glob("v*") if _NAME.fullmatch(p.name)):
            try:
                found = read(path)
                if path.name != _name(found.version):
                    raise ValueError(f"{FACTS_FILE}: it is of version {found.version}")
            except ValueError as error:
                self._skip(path, str(error))
                continue
            if found.facts.run != run:
                self._log.warning("checkpoint_skipped", path=str(path), reason="of another run")
                continue
            self._known.append(found)
        self._known.sort(key=lambda checkpoint: checkpoint.version)

    def all(self) -> list[Checkpoint]:
        """Return the complete checkpoints, oldest first."""
        return list(self._known)

    def skip(self, checkpoint: Checkpoint, reason: str) -> None:
        """Forget a checkpoint that cannot be used; the next complete one replaces it."""
        self._known = [known for known in self._known if known != checkpoint]
        self._skip(checkpoint.path, reason)

    def write(self, snapshots: Sequence[Snapshot], facts: Facts) -> Checkpoint:
        """Write a checkpoint atomically and delete the ones beyond `keep`.

        An older one goes only when the new one is whole and on the disk.

        Raises:
            Fatal: the disk is full or not writable; nothing half-written is left in place.
        """
        final = self._folder / _name(facts.version)
        partial = self._folder / f".{final.name}.partial"
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            for snapshot in snapshots:
                snapshot.write(partial)
            sealed = seal(partial, facts)
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            sync(self._folder)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            reason = error.strerror or str(error)
            raise Fatal(f"checkpoint {final}: {reason}: free some space and restart") from error
        saved = Checkpoint(final, facts, sealed.files)
        known = [c for c in self._known if c.version < facts.version] + [saved]
        obsolete = [c.path for c in known[: -self._keep]] + self._damaged
        for path in obsolete:
            if path != final:
                shutil.rmtree(path, ignore_errors=True)
        self._known, self._damaged = known[-self._keep :], []
        return saved

    def _skip(self, path: Path, reason: str) -> None:
        self._damaged.append(path)
        self._log.warning("checkpoint_skipped", path=str(path), reason=reason)


def _name(version: int) -> str:
    return f"v{version:06d}"
