"""The archive of a run: every stream as a file, every version's weights kept aside.

`<run dir>/archive/` holds

- `<stream>.bin`: msgpack arrays `[seq, subject, stored_at, payload]`, appended in stream order;
  the last one may be torn by a crash. `leases.bin` has the same form, its `seq` counts lines.
- `versions/<version:06d>.safetensors`: the full weights of every published version.
- `tickets_final.json`: ids of the tickets still in the ticket stream when recording stopped.

The readers need msgpack only, so that the audit shares nothing with the services.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, Self, cast

import msgpack

ArchivedStream = Literal["terminals", "scores", "journal", "manifests", "stats", "dead"]
"""Streams that are archived; tickets, chunks and blobs live on in the others or in `versions/`."""

ArchiveName = Literal["terminals", "scores", "journal", "manifests", "stats", "dead", "leases"]

STREAMS: tuple[ArchivedStream, ...] = (
    "terminals", "scores", "journal", "manifests", "stats", "dead",
)  # fmt: skip
NAMES: tuple[ArchiveName, ...] = (*STREAMS, "leases")


@dataclass(frozen=True, slots=True)
class Record:
    """One archived message."""

    seq: int
    """Sequence in its stream, from 1; for leases the line's number."""
    subject: str
    payload: bytes
    stored_at: float
    """Unix seconds: the server's clock; for leases the recorder's, at receipt."""


def archive_dir(run_dir: Path) -> Path:
    """Return the archive's folder of a run."""
    return run_dir / "archive"


def stream_path(directory: Path, name: ArchiveName) -> Path:
    """Return the file of one stream."""
    return directory / f"{name}.bin"


def version_path(directory: Path, version: int) -> Path:
    """Return the file of one version's full weights."""
    return directory / "versions" / f"{version:06d}.safetensors"


def archived_versions(directory: Path) -> list[int]:
    """Return the versions kept aside, ascending."""
    return sorted(int(path.stem) for path in (directory / "versions").glob("[0-9]*.safetensors"))


def read_stream(directory: Path, name: ArchiveName) -> Iterator[Record]:
    """Yield the archived messages in order, up to a torn end; nothing when there is no file.

    Streams: memory holds one record at a time.
    """
    path = stream_path(directory, name)
    if not path.exists():
        return
    with path.open("rb") as file:
        for record, _ in _complete(file):
            yield record


def read_tickets_final(directory: Path) -> tuple[str, ...] | None:
    """Return ids of tickets left in the ticket stream, None when recording did not end in order."""
    path = directory / "tickets_final.json"
    if not path.exists():
        return None
    return tuple(cast("list[str]", json.loads(path.read_text())))


class ArchiveWriter:
    """Appends to the archive; opening one drops torn ends, so that it goes on where files end.

    Nothing is durable before `sync` returns.
    """

    def __init__(self, directory: Path) -> None:
        (directory / "versions").mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._last: dict[ArchiveName, int] = {}
        self._files: dict[ArchiveName, BinaryIO] = {}
        self._packer = msgpack.Packer(use_bin_type=True)
        for name in NAMES:
            self._open(name)

    def last_seq(self, name: ArchiveName) -> int:
        """Return the highest sequence in the file, 0 when it is empty."""
        return self._last[name]

    def positions(self) -> dict[str, int]:
        """Return `last_seq` of every stream."""
        return {name: self._last[name] for name in STREAMS}

    def append(self, name: ArchiveName, records: Iterable[Record]) -> None:
        """Append in ascending order; a sequence at or below `last_seq` is skipped."""
        file = self._files[name]
        for record in records:
            if record.seq <= self._last[name]:
                continue
            row = (record.seq, record.subject, record.stored_at, record.payload)
            file.write(cast(bytes, self._packer.pack(row)))
            self._last[name] = record.seq

    def append_line(self, name: Literal["leases"], record: Record) -> None:
        """Append a message that has no sequence of its own under the next line number."""
        seq = self._last[name] + 1
        self.append(name, [Record(seq, record.subject, record.payload, record.stored_at)])

    def sync(self) -> dict[str, int]:
        """Make durable what was appended before the call; return the positions it covers.

        May run on another thread than `append`.
        """
        covered = self.positions()
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        return covered

    def write_version(self, version: int, pieces: Iterable[bytes | memoryview]) -> None:
        """Keep one version's safetensors bytes aside, whole or not at all."""
        _write_whole(version_path(self._directory, version), pieces)

    def write_tickets_final(self, ticket_ids: Iterable[str]) -> None:
        content = json.dumps(sorted(ticket_ids)).encode()
        _write_whole(self._directory / "tickets_final.json", [content])

    def close(self) -> None:
        self.sync()
        for file in self._files.values():
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self, name: ArchiveName) -> None:
        path = stream_path(self._directory, name)
        file = path.open("r+b" if path.exists() else "w+b")
        last, end = 0, 0
        for record, end_of_record in _complete(file):
            last, end = record.seq, end_of_record
        file.truncate(end)
        file.seek(end)
        self._last[name] = last
        self._files[name] = file


def _complete(file: BinaryIO) -> Iterator[tuple[Record, int]]:
    """Yield complete records and the offset each ends at; stops at the first torn one."""
    unpacker = msgpack.Unpacker(file, raw=False, use_list=False, max_buffer_size=0)
    while True:
        try:
            row = cast(object, unpacker.unpack())
        except (msgpack.OutOfData, msgpack.UnpackException, ValueError):
            return
        match row:
            case (int(seq), str(subject), float(stored_at), bytes(payload)):
                yield Record(seq, subject, payload, stored_at), cast(int, unpacker.tell())
            case _:
                return


def _write_whole(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        file.writelines(pieces)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def safetensors_bytes(tensors: Mapping[str, tuple[str, tuple[int, ...], bytes]]) -> bytes:
    """Serialise `{name: (safetensors dtype, shape, little-endian bytes)}` as a safetensors file."""
    header: dict[str, object] = {}
    offset = 0
    for name in sorted(tensors):
        dtype, shape, data = tensors[name]
        header[name] = {
            "dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + len(data)],
        }  # fmt: skip
        offset += len(data)
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    body = b"".join(tensors[name][2] for name in sorted(tensors))
    return len(head).to_bytes(8, "little") + head + body
