"""Bytes of one artefact while they are needed: in memory up to a limit, beyond it in a file."""

from __future__ import annotations

import os
import tempfile
from bisect import bisect_right
from typing import BinaryIO, cast

SPOOL_BYTES = 256 * 1024 * 1024
"""Default of what a spool keeps in memory."""

_SEAL_BYTES = 1024 * 1024
"""Small writes are gathered to pieces of this size; larger ones are kept as they are."""


class Spool:
    """Written once from front to back, then read anywhere, by several threads at a time.

    The first `memory_bytes` stay in memory; what follows goes to a temporary file that has no name
    and vanishes with the process. Give it back with `close`.
    """

    def __init__(self, memory_bytes: int = SPOOL_BYTES) -> None:
        self.size = 0
        """Bytes written."""
        self._memory_bytes = memory_bytes
        self._sealed: list[bytes] = []
        self._starts: list[int] = []
        """Offset of every sealed piece."""
        self._sealed_bytes = 0
        self._open = bytearray()
        """The newest piece in memory, still growing."""
        self._file: BinaryIO | None = None
        self._closed = False

    @property
    def bytes_in_memory(self) -> int:
        return self._sealed_bytes + len(self._open)

    @property
    def bytes_spilled(self) -> int:
        """Bytes in the temporary file."""
        return self.size - self.bytes_in_memory

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append `data`; the caller may reuse its buffer.

        Raises:
            OSError: the temporary file cannot be made, or its disk is full; nothing is left to do
                with the spool but to close it.
            ValueError: the spool is closed.
        """
        self._check_open()
        view = memoryview(data).cast("B")
        room = max(0, self._memory_bytes - self.bytes_in_memory)
        # Once something is in the file everything after it must be, too.
        kept = 0 if self._file is not None else min(room, len(view))
        if kept:
            self._keep(data if isinstance(data, bytes) and kept == len(data) else view[:kept])
        if kept < len(view):
            self._spill(view[kept:])
        self.size += len(view)

    def read(self, offset: int, num_bytes: int) -> memoryview:
        """Return bytes; those of one piece in memory without a copy.

        Raises:
            ValueError: not within what was written, or the spool is closed.
            OSError: the temporary file cannot be read.
        """
        self._check_open()
        if offset < 0 or num_bytes < 0 or offset + num_bytes > self.size:
            raise ValueError(f"bytes {offset}..{offset + num_bytes} of a spool of {self.size}")
        in_memory = self.bytes_in_memory
        split = max(0, min(num_bytes, in_memory - offset))
        if split == num_bytes:
            return self._from_memory(offset, num_bytes)
        if split == 0:
            return memoryview(self._from_file(offset - in_memory, num_bytes))
        head = self._from_memory(offset, split)
        return memoryview(b"".join((head, self._from_file(0, num_bytes - split))))

    def close(self) -> None:
        """Give memory and file back; views handed out stay valid."""
        self._closed = True
        self._sealed, self._starts, self._open = [], [], bytearray()
        self._sealed_bytes = self.size = 0
        if self._file is not None:
            self._file.close()
            self._file = None

    def _keep(self, data: bytes | memoryview) -> None:
        if len(self._open) + len(data) < _SEAL_BYTES:
            self._open += data
            return
        self._seal(bytes(self._open))
        self._open = bytearray()
        self._seal(bytes(data))

    def _seal(self, piece: bytes) -> None:
        if piece:
            self._starts.append(self._sealed_bytes)
            self._sealed.append(piece)
            self._sealed_bytes += len(piece)

    def _spill(self, view: memoryview) -> None:
        if self._file is None:
            # Unbuffered: what is written can be read at once, through the descriptor.
            self._file = cast("BinaryIO", tempfile.TemporaryFile(buffering=0))  # noqa: SIM115
        done = 0
        while done < len(view):
            done += self._file.write(view[done:])

    def _from_memory(self, offset: int, num_bytes: int) -> memoryview:
        parts: list[memoryview] = []
        index = bisect_right(self._starts, offset) - 1
        while num_bytes and 0 <= index < len(self._sealed):
            inside = offset - self._starts[index]
            if inside >= len(self._sealed[index]):
                break
            part = memoryview(self._sealed[index])[inside : inside + num_bytes]
            parts.append(part)
            offset, num_bytes, index = offset + len(part), num_bytes - len(part), index + 1
        if num_bytes:
            inside = offset - self._sealed_bytes
            # A copy: a growing piece must not be pinned by a view of it.
            parts.append(memoryview(bytes(self._open[inside : inside + num_bytes])))
        return parts[0] if len(parts) == 1 else memoryview(b"".join(parts))

    def _from_file(self, offset: int, num_bytes: int) -> bytes:
        assert self._file is not None
        parts: list[bytes] = []
        while num_bytes:
            part = os.pread(self._file.fileno(), num_bytes, offset)
            if not part:
                raise OSError(f"the spool's file ends at {offset}")
            parts.append(part)
            offset, num_bytes = offset + len(part), num_bytes - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("the spool is closed")
