"""The deltas that a history keeps between its versions."""

from __future__ import annotations

from shared.weights.deltas import DeltaReader
from shared.weights.spool import Spool

_COPY_BYTES = 4 * 1024 * 1024


class Link:
    """A delta, checked as far as its header and trailer go, and the spool that it lies in."""

    def __init__(self, spool: Spool) -> None:
        """Read header, trailer and block heads; `spool` belongs to the link then.

        Raises:
            Corrupt: not a delta.
            OSError: the spool cannot be read.
        """
        self.spool = spool
        self.reader = DeltaReader(spool)

    def close(self) -> None:
        """Give memory and file back."""
        self.spool.close()

    def spill(self) -> None:
        """Move what lies in memory to a file.

        Raises:
            OSError: the file cannot be written; the link is as before.
        """
        spilled = Spool(memory_bytes=0)
        try:
            for offset in range(0, self.spool.size, _COPY_BYTES):
                num_bytes = min(_COPY_BYTES, self.spool.size - offset)
                spilled.write(self.spool.read(offset, num_bytes))
            reader = DeltaReader(spilled)
        except BaseException:
            spilled.close()
            raise
        in_memory, self.spool, self.reader = self.spool, spilled, reader
        in_memory.close()
