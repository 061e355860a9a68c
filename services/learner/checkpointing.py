"""When the learner checkpoints, what a restart may go back to, and what that costs.

Consumes versions as they are made; waits for the copy of the state only; produces checkpoints, and
the floors below which nothing is needed any more: these rise when a checkpoint is whole on disk.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from services.learner.checkpoint import Carries, CheckpointStore
from services.learner.checkpoint_files import Facts
from services.learner.checkpoint_writer import CheckpointWriter, Written
from services.learner.config import LearnerConfig
from shared.runtime.logs import Log


class Checkpointing:
    """The checkpoints of one learner process."""

    def __init__(
        self,
        config: LearnerConfig,
        parts: Sequence[Carries],
        log: Log,
        on_complete: Callable[[int], None],
    ) -> None:
        """Checkpoint `parts`; tell `on_complete` the oldest retained version when it changes."""
        section = config.learner.checkpoint
        self.store = CheckpointStore(Path(config.run.dir) / "checkpoints", section.keep, log)
        self._writer = CheckpointWriter(self.store)
        self._every, self._last = section.every_versions, config.learner.versions
        self._parts = parts
        self._on_complete = on_complete
        self._begun = self._newest = 0
        self._stall_s = self._write_s = 0.0

    @property
    def retained_versions(self) -> list[int]:
        """Versions of the checkpoints a restart may go back to."""
        return [checkpoint.version for checkpoint in self.store.all()] or [0]

    @property
    def floors(self) -> dict[str, int]:
        """Stream -> lowest sequence that a retained checkpoint may still need; {} = all."""
        kept = [checkpoint.facts.floors for checkpoint in self.store.all()]
        names = ("terminals", "scores") if kept else ()
        return {name: min(floors.get(name, 0) for floors in kept) for name in names}

    def restored(self, version: int) -> None:
        """Note which one this process began with."""
        self._begun = self._newest = version

    async def step(self, version: int, facts: Callable[[], Facts]) -> None:
        """Begin a checkpoint when one is due; while one is being written the next step asks again.

        Raises:
            Fatal: the one before could not be written.
        """
        self.settle()
        due = version == self._last or version // self._every > self._begun // self._every
        self._stall_s = 0.0
        if due and not self._writer.busy:
            await self._begin(facts())

    async def finish(self, version: int, facts: Callable[[], Facts]) -> None:
        """Leave a complete checkpoint of `version` behind.

        Raises:
            Fatal: it, or the one before, could not be written.
        """
        self._note(await self._writer.wait())
        if version not in self.retained_versions:
            await self._begin(facts())
            self._note(await self._writer.wait())

    def settle(self) -> None:
        """Take note of what the thread has completed.

        Raises:
            Fatal: it could not write; nothing half-written is in place.
        """
        self._note(self._writer.settle())

    def scalars(self) -> dict[str, float]:
        """Return the loop's seconds for the last step's checkpoint, the thread's for its last."""
        return {"checkpoint_s": self._stall_s, "checkpoint_write_s": self._write_s}

    def figures(self) -> dict[str, float]:
        """Return what is exported beside: the version that a restart would begin at."""
        return {"checkpoint_version": float(self._newest), **self.scalars()}

    def close(self) -> None:
        """Let go of the thread."""
        self._writer.close()

    async def _begin(self, facts: Facts) -> None:
        started = time.perf_counter()
        snapshots = await asyncio.to_thread(lambda: [part.snapshot() for part in self._parts])
        self._writer.start(snapshots, facts)
        self._begun = facts.version
        self._stall_s = time.perf_counter() - started

    def _note(self, written: Written | None) -> None:
        if written is not None:
            self._write_s = written.seconds
            self._newest = written.checkpoint.version
            self._on_complete(min(self.retained_versions))
