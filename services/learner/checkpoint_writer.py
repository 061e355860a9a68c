"""Writing checkpoints beside training: the loop pays for the copy, a thread for the disk."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from services.learner.checkpoint import CheckpointStore
from services.learner.checkpoint_files import Checkpoint, Facts
from shared.backends.base import Snapshot


@dataclass(frozen=True, slots=True)
class Written:
    """A checkpoint that is complete on the disk."""

    checkpoint: Checkpoint
    seconds: float
    """In the writing thread."""


class CheckpointWriter:
    """At most one writing in flight; whoever owns it looks after it with `settle`."""

    def __init__(self, store: CheckpointStore) -> None:
        self._store = store
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[Written] | None = None

    @property
    def busy(self) -> bool:
        """Whether a writing is in flight, or its outcome has not been settled."""
        return self._writing is not None

    def start(self, snapshots: Sequence[Snapshot], facts: Facts) -> None:
        """Hand a snapshot over to the thread; settle the one before first."""
        assert self._writing is None
        self._writing = self._executor.submit(self._write, snapshots, facts)

    def settle(self) -> Written | None:
        """Return the writing that has completed since the last call, if one has.

        Raises:
            Fatal: it failed; nothing half-written is in place.
        """
        if self._writing is None or not self._writing.done():
            return None
        done, self._writing = self._writing, None
        return done.result()

    async def wait(self) -> Written | None:
        """Wait for the writing in flight and return it, None when there is none.

        Raises:
            Fatal: it failed; nothing half-written is in place.
        """
        if self._writing is not None:
            await asyncio.to_thread(wait, [self._writing])
        return self.settle()

    def close(self) -> None:
        """Let go of the thread; what is in flight is finished by it."""
        self._executor.shutdown(wait=False)

    def _write(self, snapshots: Sequence[Snapshot], facts: Facts) -> Written:
        started = time.perf_counter()
        saved = self._store.write(snapshots, facts)
        return Written(saved, time.perf_counter() - started)
