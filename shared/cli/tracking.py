"""Hands a run's step reports and evaluations to its trackers, each version once.

Consumes the `stats` and `journal` logs in order from where the tracker's own positions end; waits
for new records; produces points. The logs are the queue: a tracker that is slow, fails or hangs
holds back its own reading and nothing else, and no more than one batch per log is in memory.

A position is written down *before* its point is: a crash between the two may cost a tracker that
point, and no point is ever written twice.
"""

from __future__ import annotations

import asyncio
import json
import os
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import aclosing, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from shared.cli.tracked_points import Point, of_evaluation, of_step
from shared.cli.trackers import Tracker, Wanted
from shared.runtime.bus import Bus, Record
from shared.runtime.logs import Log
from shared.wire.codec import decode
from shared.wire.errors import WireError
from shared.wire.journal import Evaluated, JournalEntry
from shared.wire.telemetry import StepReport

Source = Literal["stats", "journal"]
SOURCES: tuple[Source, ...] = ("stats", "journal")


@dataclass
class Progress:
    """How far one tracker is, and what it failed at; kept in `<folder>/<tracker>.json`."""

    stats: int = 0
    """Last sequence of the log that was handed over."""
    journal: int = 0
    version: int = 0
    """Newest version whose step was handed over."""
    points: int = 0
    """Handed over."""
    failures: int = 0
    """Points that could not be written."""
    hangs: int = 0
    """Points that took longer than `trackers.timeout_s`."""

    @classmethod
    def read(cls, path: Path) -> Progress:
        """Return what a file says; a fresh one where there is none or it cannot be read."""
        with suppress(OSError, ValueError, TypeError):
            return cls(**json.loads(path.read_text()))
        return cls()

    def write(self, path: Path) -> None:
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(self)) + "\n")
        partial.replace(path)


class _Hand:
    """A daemon thread that does one thing after another: whoever hangs in it keeps nobody alive."""

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[tuple[Callable[[], None], Future[None]]] = queue.SimpleQueue()
        threading.Thread(target=self._work, name=f"tracker-{name}", daemon=True).start()

    def do(self, job: Callable[[], None]) -> Future[None]:
        future: Future[None] = Future()
        self._jobs.put((job, future))
        return future

    def _work(self) -> None:
        while True:
            job, future = self._jobs.get()
            try:
                job()
            except BaseException as error:  # noqa: BLE001 - a tracker may raise anything
                future.set_exception(error)
            else:
                future.set_result(None)


class Tracking:
    """All trackers of one run."""

    def __init__(
        self,
        bus: Bus,
        wanted: Sequence[Wanted],
        folder: Path,
        log: Log,
        *,
        samples: int = 1,
        success: float = 1.0,
        timeout_s: float = 30.0,
        catch_up_s: float = 15.0,
    ) -> None:
        """Prepare; nothing is opened yet.

        Args:
            bus: connected, its streams exist.
            wanted: trackers, by name.
            folder: for their positions; made where it does not exist.
            log: WARNING when a tracker begins to fail or hang, INFO when it writes again.
            samples: k of avg@k and pass@k.
            success: a reward from here on counts as a success.
            timeout_s: a point that takes longer is a hang.
            catch_up_s: bound on reading to the logs' ends after a stop.
        """
        self._trackers = [_Tracked(one, folder, log, timeout_s) for one in wanted]
        self._bus = bus
        self._log = log
        self._samples, self._success = samples, success
        self._catch_up_s = catch_up_s

    @property
    def hanging(self) -> list[str]:
        """Names of the trackers whose thread has not come back."""
        return [tracked.name for tracked in self._trackers if tracked.busy]

    async def run(self, stop: asyncio.Event) -> None:
        """Track until `stop`, then to the logs' current ends.

        Raises:
            BusUnavailable: the bus did not answer within its bounds.
        """
        if not self._trackers:
            return
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(self._follow(tracked, source))
                for tracked in self._trackers
                for source in SOURCES
            ]
            await stop.wait()
            ends: dict[Source, int] = {
                name: (await self._bus.stream_state(name)).last_seq for name in SOURCES
            }
            with suppress(TimeoutError):
                async with asyncio.timeout(self._catch_up_s):
                    await asyncio.gather(*(t.finish(ends) for t in self._trackers))
            for task in tasks:
                task.cancel()
        for tracked in self._trackers:
            tracked.tell(ends)

    async def _follow(self, tracked: _Tracked, source: Source) -> None:
        async with aclosing(self._bus.read(source, tracked.position(source) + 1)) as batches:
            async for batch in batches:
                for record in batch:
                    await tracked.take(source, record.seq, self._point(source, record))

    def _point(self, source: Source, record: Record) -> Point | None:
        try:
            if source == "stats":
                return of_step(decode(record.payload, StepReport))
            body = decode(record.payload, JournalEntry).body
        except WireError as error:
            self._log.warning("tracker_skips", stream=source, seq=record.seq, reason=str(error))
            return None
        if not isinstance(body, Evaluated):
            return None
        return of_evaluation(body, record.stored_at, samples=self._samples, success=self._success)


class _Tracked:
    """One tracker, its thread and its position."""

    def __init__(self, wanted: Wanted, folder: Path, log: Log, timeout_s: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.name = wanted.name
        self._open = wanted.open
        self._path = folder / f"{wanted.name}.json"
        self._progress = Progress.read(self._path)
        self._log = log
        self._timeout_s = timeout_s
        self._hand = _Hand(wanted.name)
        self._tracker: Tracker | None = None
        self._turn = asyncio.Lock()
        self._moved = asyncio.Event()
        self._failing = False
        self._outcome: Future[None] | None = None

    @property
    def busy(self) -> bool:
        return self._outcome is not None and not self._outcome.done()

    def position(self, source: Source) -> int:
        return getattr(self._progress, source)

    async def take(self, source: Source, seq: int, point: Point | None) -> None:
        """Write a record's point, unless an earlier record of the log brought that version."""
        async with self._turn:  # both logs write into one tracker
            progress = self._progress
            setattr(progress, source, seq)
            if point is not None and source == "stats":
                point = point if point.version > progress.version else None
                progress.version = max(progress.version, point.version if point else 0)
            if point is not None:
                progress.points += 1
                await self._write(point, progress.points)
        self._moved.set()

    async def finish(self, ends: dict[Source, int]) -> None:
        """Wait until everything up to `ends` was handed over, then close the tracker."""
        while True:
            async with self._turn:
                if all(self.position(name) >= end for name, end in ends.items()):
                    if (tracker := self._tracker) is not None:
                        await self._done(self._hand.do(tracker.close), "close")
                    return
                self._moved.clear()
            await self._moved.wait()

    def tell(self, ends: dict[Source, int]) -> None:
        """Keep the counts and log what there is to know at the end."""
        with suppress(OSError):
            self._progress.write(self._path)
        behind = [name for name, end in ends.items() if self.position(name) < end]
        level = self._log.warning if behind or self.busy else self._log.info
        level("tracked", tracker=self.name, behind=behind, **asdict(self._progress))

    async def _write(self, point: Point, number: int) -> None:
        def job() -> None:
            self._progress.write(self._path)
            if self._tracker is None:
                self._tracker = self._open()
            self._tracker.write(point, number)

        await self._done(self._hand.do(job), f"version {point.version}")

    async def _done(self, outcome: Future[None], what: str) -> None:
        """Wait for the thread, however long; tell about a hang or failure when it begins."""
        self._outcome = outcome
        done = asyncio.wrap_future(outcome)
        try:
            await asyncio.wait((done,), timeout=self._timeout_s)
            if not done.done():
                self._progress.hangs += 1
                self._fails(what, f"no end after {self._timeout_s:g} s")
            await asyncio.shield(done)
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # noqa: BLE001 - a tracker may raise anything
            self._progress.failures += 1
            self._fails(what, " ".join(f"{type(error).__name__}: {error}".split())[:300])
        else:
            if self._failing:
                self._failing = False
                self._log.info("tracker_writes_again", tracker=self.name, at=what)

    def _fails(self, what: str, reason: str) -> None:
        if not self._failing:
            self._log.warning("tracker_fails", tracker=self.name, at=what, reason=reason)
        self._failing = True


def leave(code: int, hanging: Sequence[str]) -> int:
    """Return the exit code; end the process at once where a tracker's thread will not end."""
    if hanging:
        os._exit(code)
    return code
