"""Where a publisher's deltas and keyframes go."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from typing import Literal

import torch

from shared.runtime.bus import Bus
from shared.runtime.errors import BusError, BusUnavailable
from shared.weights import deltas, keyframes
from shared.weights.chunks import upload
from shared.weights.deltas import DeltaWriter
from shared.weights.digests import num_bytes
from shared.weights.keyframe_store import KeyframeStore, put_keyframe
from shared.weights.offload import INLINE_BYTES
from shared.wire.weights import Artefact


class ArtefactWriter:
    """Stores artefacts piece by piece: deltas on the bus, keyframes there or in the store."""

    def __init__(self, bus: Bus, store: KeyframeStore | None, chunk_bytes: int) -> None:
        self._bus = bus
        self._store = store
        self._chunk_bytes = chunk_bytes
        self.first_seqs: dict[str, int] = {}
        """upload id -> sequence of its first chunk."""
        self.in_flight: set[str] = set()
        """Upload ids that no record names yet because they are on their way."""

    async def delta(self, upload_id: str, writer: DeltaWriter, size: int) -> Artefact:
        """Store a delta between states of `size` bytes; the writer's `tensors` are known then.

        Raises:
            BusError: the bus refused or did not answer.
        """
        pieces = _at_once(writer.pieces(), size)
        return await self._upload("delta", pieces, upload_id, deltas.CODEC)

    async def keyframe(self, upload_id: str, state: Mapping[str, torch.Tensor]) -> Artefact:
        """Store a state in full.

        Raises:
            BusError: the bus refused or did not answer, or the store did.
        """
        pieces = keyframes.SafetensorsPieces(state)
        if self._store is not None:
            try:
                with self._flying(upload_id):
                    return await put_keyframe(self._store, upload_id, pieces)
            except OSError as error:
                raise BusUnavailable(f"weights.keyframe_store: {error}") from error
        whole = _at_once(pieces, num_bytes(state))
        return await self._upload("keyframe", whole, upload_id, keyframes.ENCODING)

    async def _upload(
        self,
        kind: Literal["delta", "keyframe"],
        pieces: Iterable[bytes],
        upload_id: str,
        encoding: str,
    ) -> Artefact:
        with self._flying(upload_id):
            try:
                uploaded = await upload(
                    self._bus,
                    kind,
                    pieces,
                    upload_id=upload_id,
                    encoding=encoding,
                    chunk_bytes=self._chunk_bytes,
                )
            except BusUnavailable:
                raise  # a bus that is away would only be waited for once more
            except BusError:
                await self._drop(upload_id)
                raise
        self.first_seqs[upload_id] = uploaded.first_seq
        return uploaded.artefact

    async def _drop(self, upload_id: str) -> None:
        """Drop the chunks of a refused upload: a stream that is full must not stay so."""
        try:
            end = (await self._bus.stream_state("chunks")).last_seq
            pattern = f"{self._bus.subjects.prefix}.chunk.{upload_id}.*"
            await self._bus.purge("chunks", end + 1, subject=pattern)
        except BusError:
            return  # the sweep of orphans takes them later

    @contextmanager
    def _flying(self, upload_id: str) -> Generator[None]:
        self.in_flight.add(upload_id)
        try:
            yield
        finally:
            self.in_flight.discard(upload_id)


def _at_once(pieces: Iterable[bytes], size: int) -> Iterable[bytes]:
    """Return pieces of a small model as a list: a thread hop per piece would cost more."""
    return list(pieces) if size <= INLINE_BYTES else pieces
