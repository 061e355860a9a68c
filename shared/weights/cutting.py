"""Pieces of any size cut to chunks of one size, in a thread where making them is work."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable, Generator, Iterable, Iterator, Sequence
from contextlib import aclosing

import xxhash

from shared.weights.pull import pull

Piece = bytes | bytearray | memoryview


class Cutter:
    """Cuts pieces to chunks; at least one chunk comes of it."""

    def __init__(self, chunk_bytes: int) -> None:
        self.num_bytes = 0
        """Of all pieces so far."""
        self.digest = xxhash.xxh3_128()
        """Of all pieces so far."""
        self._chunk_bytes = chunk_bytes
        self._rest = bytearray()

    def cut(self, piece: Piece) -> Iterator[bytes]:
        """Yield the chunks that `piece` completes."""
        view = memoryview(piece).cast("B")
        self.num_bytes += len(view)
        self.digest.update(view)
        while len(view):
            if not self._rest and len(view) >= self._chunk_bytes:
                yield bytes(view[: self._chunk_bytes])
                view = view[self._chunk_bytes :]
                continue
            missing = self._chunk_bytes - len(self._rest)
            self._rest += view[:missing]
            view = view[missing:]
            if len(self._rest) == self._chunk_bytes:
                yield bytes(self._rest)
                self._rest.clear()

    def rest(self) -> Iterator[bytes]:
        """Yield the last chunk, if there is one."""
        if self._rest or not self.num_bytes:
            yield bytes(self._rest)

    def cut_all(self, pieces: Iterable[Piece]) -> Iterator[bytes]:
        """Yield the chunks of all pieces; a generator of pieces is closed at the end."""
        iterator = iter(pieces)
        try:
            for piece in iterator:
                yield from self.cut(piece)
            yield from self.rest()
        finally:
            if isinstance(iterator, Generator):
                iterator.close()


async def cut(
    cutter: Cutter, pieces: Iterable[Piece] | AsyncIterable[Piece]
) -> AsyncGenerator[bytes, None]:
    """Yield the chunks of `pieces`.

    A sequence is there already and is cut in the event loop. Any other iterable is advanced in a
    thread, one chunk at a time; once this generator is closed nobody touches it any more, and if
    it is a generator it is closed, too.
    """
    if isinstance(pieces, AsyncIterable):
        async for piece in pieces:
            for chunk in cutter.cut(piece):
                yield chunk
        for chunk in cutter.rest():
            yield chunk
    elif isinstance(pieces, Sequence):
        for chunk in cutter.cut_all(pieces):
            yield chunk
    else:
        async with aclosing(pull(cutter.cut_all(pieces))) as chunks:
            async for chunk in chunks:
                yield chunk
