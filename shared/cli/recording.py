"""What the recorder does: every stream into the archive, every version kept aside.

Streams: consume the logs in order from where the files end; wait for new records; produce files.
Versions: consume the manifest log and the chunks; produce one file per version.
Sync: every second, makes the files durable and publishes how far, so that the learner purges only
what is archived. All of it goes on after a restart where the files end.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path
from typing import cast

import msgpack

from shared.cli.archive import STREAMS, ArchivedStream, ArchiveWriter, Record, archived_versions
from shared.runtime import bus as runtime_bus
from shared.runtime.bus import Bus, CoreMessage, StreamState
from shared.runtime.logs import Log
from shared.runtime.sections import WeightsSection
from shared.weights.assembly import make_follower, make_history
from shared.weights.errors import MissingVersion
from shared.weights.fan_out import fan_out
from shared.weights.keyframes import SafetensorsPieces
from shared.weights.manifest_log import read_head
from shared.wire.weights import Manifest

_PIECE_BYTES = 1 << 22

ARCHIVED_KEY = "archived"
"""Key of the control bucket: msgpack `{stream: last archived seq, "versions": v}`; every version
<= v is kept aside."""


class Recording:
    """One recorder's work on one bus and one archive folder."""

    def __init__(
        self,
        bus: Bus,
        directory: Path,
        log: Log,
        weights: WeightsSection = WeightsSection(),
        *,
        sync_s: float = 1.0,
        catch_up_s: float = 15.0,
    ) -> None:
        """Prepare; nothing is read yet.

        Args:
            bus: connected, its streams exist.
            directory: the archive's folder.
            log: INFO at start and end.
            weights: how versions travel.
            sync_s: between two fsyncs.
            catch_up_s: bound on reading to the streams' ends after a stop.
        """
        self._bus = bus
        self._log = log
        self._sync_s = sync_s
        self._catch_up_s = catch_up_s
        self._directory = directory
        self._writer = ArchiveWriter(directory)
        self._history = make_history(weights, keep_past=True)
        self._follower = make_follower(weights, bus, self._history, log)
        self._kept = set(archived_versions(directory))
        self._lost: set[int] = set()

    @property
    def contiguous_version(self) -> int:
        """Newest version below which none is missing, -1 when version 0 is."""
        version = -1
        while version + 1 in self._kept or version + 1 in self._lost:
            version += 1
        return version

    async def run(self, stop: asyncio.Event) -> None:
        """Record until `stop`, then to the streams' current ends.

        Raises:
            BusUnavailable: the bus did not answer within its bounds.
            OSError: the disk is full or gone.
        """
        leases = await self._bus.subscribe(self._bus.subjects.leases, self._take_lease)
        self._log.info("recording", positions=self._writer.positions(), versions=len(self._kept))
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._record(name)) for name in STREAMS]
                tasks.append(group.create_task(self._follow()))
                tasks.append(group.create_task(self._keep_durable()))
                await stop.wait()
                await self._catch_up()
                for task in tasks:
                    task.cancel()
            await self._sync()
            self._writer.write_tickets_final(await self._remaining_tickets())
        finally:
            await leases.close()
            self._writer.close()
        self._log.info("recorded", positions=self._writer.positions(), versions=len(self._kept))

    async def _take_lease(self, message: CoreMessage) -> None:
        self._writer.append_line("leases", Record(0, message.subject, message.payload, time.time()))

    async def _record(self, name: ArchivedStream) -> None:
        start = self._writer.last_seq(name) + 1
        async with aclosing(self._bus.read(name, start)) as batches:
            async for batch in batches:
                self._writer.append(name, map(_archived, batch))

    # --- versions
    async def _follow(self) -> None:
        await self._follower.run(
            self._on_head, start="oldest_needed", on_version=self._keep_version
        )

    async def _keep_version(self, manifest: Manifest) -> None:
        version = manifest.version
        if version not in self._kept:
            async with self._history.at(version) as state:
                pieces = SafetensorsPieces(state, _PIECE_BYTES)
                await asyncio.to_thread(self._writer.write_version, version, pieces)
            self._kept.add(version)

    async def _on_head(self, manifest: Manifest, changed: frozenset[str] | None) -> None:
        del changed
        for version in range(manifest.version):
            if version not in self._kept and version not in self._lost:
                await self._fetch_missing(version)
        self._history.evict_below(self.contiguous_version)

    async def _fetch_missing(self, version: int) -> None:
        """Fetch a version below the learner's low-water mark that we have not kept yet."""
        try:
            await self._follower.ensure(version, self._catch_up_s)
        except MissingVersion as error:
            self._lost.add(version)
            self._log.error("version_lost", version=version, reason=str(error))
        except TimeoutError:
            self._log.warning("version_late", version=version)
        else:
            await self._keep_version(self._history.manifest(version))

    # --- durability and the end
    async def _keep_durable(self) -> None:
        while True:
            await asyncio.sleep(self._sync_s)
            await self._sync()

    async def _sync(self) -> None:
        versions = self.contiguous_version
        covered = await asyncio.to_thread(self._writer.sync)
        payload = cast(bytes, msgpack.packb({**covered, "versions": versions}))
        await self._bus.put_control(ARCHIVED_KEY, payload)

    async def _catch_up(self) -> None:
        ends: dict[ArchivedStream, StreamState] = {
            name: await self._bus.stream_state(name) for name in STREAMS
        }
        head = await read_head(self._bus)
        newest = -1 if head is None else head.manifest.version

        def behind() -> list[str]:
            streams: list[str] = [
                name
                for name, end in ends.items()
                if end.num_messages and self._writer.last_seq(name) < end.last_seq
            ]
            late = self.contiguous_version < newest
            return [*streams, "versions"] if late else streams

        if not await _until(lambda: not behind(), self._catch_up_s):
            self._log.error("archive_incomplete", behind=behind())

    async def _remaining_tickets(self) -> list[str]:
        state = await self._bus.stream_state("tickets")
        if not state.num_messages:
            return []

        async def get(seq: int) -> str | None:
            record = await self._bus.get("tickets", seq)
            return None if record is None else record.subject.rpartition(".")[2]

        ids = await fan_out(get, range(state.first_seq, state.last_seq + 1), window=32)
        return [ticket_id for ticket_id in ids if ticket_id is not None]


def _archived(record: runtime_bus.Record) -> Record:
    return Record(record.seq, record.subject, record.payload, record.stored_at)


async def _until(condition: Callable[[], bool], bound_s: float) -> bool:
    deadline = time.monotonic() + bound_s
    while not condition():
        if time.monotonic() >= deadline:
            return False
        await asyncio.sleep(0.02)
    return True
