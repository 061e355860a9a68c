"""What can go wrong on the way of a version, and with what a server holds."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import replace

from shared.runtime.errors import BusUnavailable
from shared.runtime.memory_bus import MemoryBus
from shared.runtime.memory_server import MemoryServer
from shared.wire.codec import decode, encode
from shared.wire.subjects import Subjects
from shared.wire.weights import Artefact, Control, Manifest


class FaultyBus(MemoryBus):
    """Fails an append to the log in one of the ways a network can."""

    fault = ""
    of = ".manifest.version"
    """What the next fault is for."""

    async def append(self, subject, payload, **options) -> int:
        if not subject.endswith(self.of) or not self.fault:
            return await super().append(subject, payload, **options)
        fault, self.fault = self.fault, ""
        if fault == "crash before":
            raise BusUnavailable("injected")
        await super().append(subject, payload, **options)
        if fault == "lost acknowledgement":
            options["msg_id"] = None  # the server forgot the id: only the fence is left
            return await super().append(subject, payload, **options)
        raise BusUnavailable("injected")


class Faults:
    """What can go wrong with what a server holds, or is about to store."""

    def __init__(self, server: MemoryServer) -> None:
        self._server = server
        self._names = Subjects("t")
        self._stored = server.streams[self._names.stream("chunks")]

    def chunks(self, artefact: Artefact) -> list[int]:
        """Sequences of an artefact's chunks."""
        records = self._stored.records
        return [seq for seq, r in records.items() if f".{artefact.upload_id}." in r.subject]

    def remove(self, seq: int) -> None:
        self._stored.remove(seq)

    def damage(self, artefact: Artefact, how: str) -> None:
        """Make an artefact "missing", "truncated", "flipped" or "swapped"."""
        records = self._stored.records
        seqs = self.chunks(artefact)
        first, last = records[seqs[0]], records[seqs[-1]]
        if how == "missing":
            self._stored.remove(last.seq)
        elif how == "truncated":
            records[last.seq] = replace(last, payload=last.payload[:-1])
        elif how == "swapped":
            records[first.seq] = replace(first, payload=last.payload)
            records[last.seq] = replace(last, payload=first.payload)
        else:
            flipped = bytes([last.payload[0] ^ 1]) + last.payload[1:]
            records[last.seq] = replace(last, payload=flipped)

    async def low_water(self, mark: int) -> None:
        control = Control(phase="running", head_version=0, oldest_needed=mark, updated_at=0.0)
        await MemoryBus(self._names, self._server).put_control("control", encode(control))

    @contextmanager
    def tamper(
        self, change: Callable[[Manifest], Manifest] = lambda manifest: manifest, lose: bool = False
    ) -> Iterator[None]:
        """Let `change` see, damage or replace manifests before they are stored, or lose them."""
        original = self._server.append

        def append(
            name: str, subject: str, payload: bytes, expected: int | None, msg_id: str
        ) -> int:
            if subject != self._names.manifest:
                return original(name, subject, payload, expected, msg_id)
            payload = encode(change(decode(payload, Manifest)))
            seq = original(name, subject, payload, expected, msg_id)
            if lose:
                stream = self._server.streams[name]
                stream.remove(seq)
                stream.by_subject[subject] = seq  # what the fence compares with
            return seq

        self._server.append = append  # type: ignore[method-assign]
        try:
            yield
        finally:
            self._server.append = original  # type: ignore[method-assign]

    def trickling(self) -> MemoryBus:
        """A bus that pauses after every batch of a log."""

        class Trickling(MemoryBus):
            async def read(self, *args, **options):  # type: ignore[no-untyped-def]
                async with aclosing(super().read(*args, **options)) as batches:
                    async for batch in batches:
                        yield batch
                        await asyncio.sleep(0.005)

        return Trickling(self._names, self._server)
