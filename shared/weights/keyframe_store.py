"""Keyframes as ordinary files: in a folder that all services mount, or wherever fsspec reaches.

Layout: `<upload id>/model.safetensors`, written under another name and renamed (an object store
shows an object once it is complete). Nobody looks for a file before a record in the log names it.
"""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import AsyncGenerator, Generator, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, aclosing, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import fsspec
import xxhash
from fsspec.implementations.local import LocalFileSystem

from shared.runtime.bus import Bus
from shared.weights.chunks import Check, download
from shared.weights.cutting import Piece
from shared.weights.errors import ChunkGone, Corrupt
from shared.weights.file_windows import RANGE_BYTES, WINDOW_BYTES, mapped, ranged
from shared.weights.file_writes import Write, local_file, os_errors, remote_file
from shared.weights.keyframes import ENCODING
from shared.weights.pull import pull
from shared.wire.weights import Artefact

FILE = "model.safetensors"

STALL_S = 60.0
"""One piece of a file must arrive within it; a file system that hangs is given up."""

_FIRST_POLL_S = 0.05

_UPLOAD_ID = re.compile(r"[0-9a-f]{32}(-[a-z0-9]{1,8})?")
"""What a publisher calls an upload. Folders of any other name are none of ours, whoever put them
below the store's URL: they are neither listed nor swept."""


class KeyframeStore:
    """One place for the keyframes of one run; everything here blocks, so call it in a thread.

    Raises:
        ValueError: fsspec does not know the URL's protocol, or its package is not installed.
    """

    def __init__(self, url: str, options: Mapping[str, Any] | None = None) -> None:
        try:
            (fs, root) = fsspec.core.url_to_fs(url, **dict(options or {}))
        except ImportError as error:
            raise ValueError(f"keyframe store {url}: {error}") from error
        self._fs = fs
        self._root = str(root).rstrip("/")
        self._local = Path(self._root) if isinstance(fs, LocalFileSystem) else None

    def put(self, upload_id: str, pieces: Iterable[Piece]) -> Artefact:
        """Write a safetensors file; return its description.

        An error of `pieces` is raised as it is, and nothing of the file stays.

        Raises:
            OSError: the store refuses it, or has no room.
            ValueError: an upload id that `list` would not recognise.
        """
        if not _UPLOAD_ID.fullmatch(upload_id):
            raise ValueError(f"upload id {upload_id!r}: 32 hex digits, and at most a suffix")
        digest = xxhash.xxh3_128()
        num_bytes = 0
        size = getattr(pieces, "num_bytes", 0)
        with self._writing(upload_id, size) as write:
            for piece in pieces:
                digest.update(piece)
                num_bytes += len(piece)
                write(piece)
        return Artefact(
            kind="keyframe",
            upload_id=upload_id,
            num_chunks=0,
            num_bytes=num_bytes,
            digest=digest.hexdigest(),
            encoding=ENCODING,
            location=f"{upload_id}/{FILE}",
        )

    def pieces(
        self, artefact: Artefact, piece_bytes: int = WINDOW_BYTES
    ) -> Generator[memoryview, None, None]:
        """Yield a keyframe in order, at most `piece_bytes` at a time.

        Length and digest are checked at the end: until this ends without an error, what it yielded
        may be wrong. Drop a piece before asking for the one after next, or its memory stays.

        Raises:
            ChunkGone: the file is not there, or cannot be read.
            Corrupt: it is not what the manifest names.
        """
        location = artefact.location
        if location != f"{artefact.upload_id}/{FILE}" or not _UPLOAD_ID.fullmatch(
            artefact.upload_id
        ):
            raise Corrupt("keyframe location", f"<upload id>/{FILE}", location)
        check = Check(artefact)
        try:
            with os_errors(location):
                for piece in self._windows(location, artefact.num_bytes, piece_bytes):
                    check.feed(piece)
                    yield piece
                    del piece
        except OSError as error:
            raise ChunkGone(f"{self._root}/{location} ({error})") from error
        check.close()

    def list(self) -> dict[str, float]:
        """Return when each upload was last written to (Unix seconds), unfinished ones included.

        Raises:
            OSError: the store does not answer.
        """
        found: dict[str, float] = {}
        with os_errors(self._root):
            self._fs.invalidate_cache()
            for folder in self._entries(self._root, "directory"):
                upload_id = folder.rstrip("/").rpartition("/")[2]
                if not _UPLOAD_ID.fullmatch(upload_id):
                    continue
                for path in self._entries(folder, "file"):
                    with suppress(FileNotFoundError):
                        modified_at = _seconds(self._fs.modified(path))
                        found[upload_id] = max(modified_at, found.get(upload_id, 0.0))
        return found

    def delete(self, upload_id: str) -> None:
        """Delete an upload; one that is not there is deleted already.

        Raises:
            OSError: the store refuses.
            ValueError: no upload id.
        """
        if not _UPLOAD_ID.fullmatch(upload_id):
            raise ValueError(f"{upload_id!r} is no upload id")
        with os_errors(upload_id), suppress(FileNotFoundError):
            self._fs.invalidate_cache()
            self._fs.rm(f"{self._root}/{upload_id}", recursive=True)

    def _windows(self, location: str, num_bytes: int, piece_bytes: int) -> Iterator[memoryview]:
        if self._local is not None:
            return mapped(self._local / location, num_bytes, piece_bytes)
        path = f"{self._root}/{location}"
        return ranged(self._fs, path, num_bytes, min(piece_bytes, RANGE_BYTES))

    def _writing(self, upload_id: str, size: int) -> AbstractContextManager[Write]:
        if self._local is not None:
            return local_file(self._local / upload_id, FILE)
        return remote_file(self._fs, f"{self._root}/{upload_id}", FILE, size)

    def _entries(self, folder: str, kind: str) -> list[str]:
        try:
            entries = self._fs.ls(folder, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return [str(entry["name"]) for entry in entries if entry["type"] == kind]


async def put_keyframe(store: KeyframeStore, upload_id: str, pieces: Iterable[Piece]) -> Artefact:
    """`store.put` in a thread; cancelled, it ends at the next piece and leaves nothing behind.

    `pieces` are not touched any more once this has returned or raised.

    Raises:
        OSError, ValueError: as `put`.
    """
    stop = threading.Event()

    def until_stopped() -> Iterator[Piece]:
        for piece in pieces:
            if stop.is_set():
                raise InterruptedError("the upload was cancelled")
            yield piece

    writing = asyncio.get_running_loop().run_in_executor(
        None, store.put, upload_id, until_stopped()
    )
    try:
        await asyncio.wait([writing])
    finally:
        if not writing.done():
            stop.set()
            await asyncio.wait([writing])
            writing.exception()
    return writing.result()


async def artefact_pieces(
    bus: Bus, store: KeyframeStore | None, artefact: Artefact, *, timeout_s: float
) -> AsyncGenerator[Piece, None]:
    """Yield the bytes of an artefact from where it says they are, in order.

    Until this ends without an error, what it yielded may be wrong. Close it
    (`contextlib.aclosing`) when leaving the loop early.

    Args:
        bus: holds chunks.
        store: holds files, when one is configured.
        artefact: what.
        timeout_s: how long to ask again for what is not there (a replica, or a shared folder's
            cache, may lag).

    Raises:
        ChunkGone: it was not there within `timeout_s`, or could not be read.
        Corrupt: the bytes are not those the manifest names; or they are in a store and none is
            configured.
        BusUnavailable: no answer within the bus's own bound.
    """
    if not artefact.location:
        async with aclosing(download(bus, artefact, timeout_s=timeout_s)) as chunks:
            async for chunk in chunks:
                yield chunk
        return
    if store is None:
        raise Corrupt(
            f"keyframe {artefact.upload_id}",
            "weights.keyframe_store to be set here as it is for the learner",
            f"no store for {artefact.location}",
        )
    deadline = time.monotonic() + timeout_s
    pause = _FIRST_POLL_S
    while True:
        begun = False
        try:
            async with aclosing(pull(store.pieces(artefact), stall_s=STALL_S)) as pieces:
                async for piece in pieces:
                    begun = True
                    yield piece
            return
        except TimeoutError as error:
            raise ChunkGone(f"{artefact.location} ({error})") from error
        except ChunkGone:
            if begun or time.monotonic() >= deadline:
                raise
        await asyncio.sleep(min(pause, max(0.0, deadline - time.monotonic())))
        pause *= 2


def _seconds(moment: datetime) -> float:
    return (moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)).timestamp()
