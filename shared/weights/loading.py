"""A keyframe on its way into the one copy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from shared.weights import deltas
from shared.weights.bits import Bits, dtype_of, to_bits
from shared.weights.blocks import BlockWriter, spans
from shared.weights.cutting import Piece
from shared.weights.delta_writer import check_same_tensors
from shared.weights.deltas import DeltaReader
from shared.weights.digests import MASK, sha256_of, specs_bytes, to_hex, version_digest
from shared.weights.errors import Corrupt, WeightsError
from shared.weights.kernels.choice import kernels_for
from shared.weights.keyframes import Run, SafetensorsFeed, TensorHead
from shared.weights.links import Link
from shared.weights.replica import Replica, State, check_state
from shared.weights.spool import Spool
from shared.wire.weights import Manifest, TensorSpec


class Load:
    """Reads a keyframe into a replica, in place, in the memory of a piece.

    Over a copy that is held it can capture the delta from there to the keyframe: what leads back,
    after a failure as well as later. The replica is empty until `finish` has compared everything.
    """

    def __init__(self, replica: Replica, manifest: Manifest, capture: Spool | None = None) -> None:
        """Begin; nothing is written yet.

        Args:
            replica: where to.
            manifest: of the keyframe's version; its digest is that of its tensors.
            capture: takes the delta from what `replica` holds, which must not be empty.

        Raises:
            WrongBase: the replica holds another model.
        """
        if not replica.is_empty:
            check_same_tensors(_forms(manifest.tensors), _forms(replica.tensors))
        self._replica = replica
        self._manifest = manifest
        self._capture = capture
        self._feed = SafetensorsFeed()
        self._writer = BlockWriter(kernels_for(specs_bytes(manifest.tensors)))
        self._kernels = kernels_for(specs_bytes(manifest.tensors))
        self._phase: Literal["header", "body", "over"] = "header"
        self._state: State = {}
        self._before: tuple[TensorSpec, ...] = ()
        """Specs of what is overwritten."""
        self._order: dict[str, int] = {}
        """Tensor -> place in the file."""
        self._targets: dict[str, Bits] = {}
        self._digests: dict[str, int] = {}
        """Of what is written so far."""
        self._gains: dict[str, int] = {}
        """What the digests gain by it, as captured."""

    def feed(self, data: Piece) -> None:
        """Take the next piece.

        Raises:
            Corrupt: not a safetensors file of the manifest's tensors.
            OSError: the capture cannot be written.
        """
        runs = self._feed.feed(data)
        if self._phase == "header" and self._feed.tensors is not None:
            self._open(self._feed.tensors)
        for run in runs:
            self._write(run)

    def finish(self) -> Link | None:
        """Let the replica hold the version; return the captured delta, if it is good.

        It is not when the copy that was overwritten was not what its digests said.

        Raises:
            Corrupt: the keyframe ends early, or is not the version that the manifest describes.
        """
        self._feed.close()
        manifest = self._manifest
        for spec in manifest.tensors:
            found = to_hex(self._digests[spec.name])
            if found != spec.digest:
                raise Corrupt(
                    f"tensor {spec.name!r} of version {manifest.version}", spec.digest, found
                )
        if manifest.sha256 is not None and (found := sha256_of(self._state)) != manifest.sha256:
            raise Corrupt(
                f"version {manifest.version}", f"sha256 {manifest.sha256}", f"sha256 {found}"
            )
        link: Link | None = None
        if self._capture is not None:
            reached = version_digest(self._reached())
            self._capture.write(self._writer.trailer(reached))
            link = Link(self._capture) if reached == manifest.digest else None
        self._phase = "over"
        self._replica.put(self._state, manifest.tensors)
        return link

    def abort(self) -> None:
        """Take back what was written. Without a capture the replica stays empty."""
        if self._phase != "body":
            return
        self._phase = "over"
        if self._capture is None:
            return
        try:
            reached = self._reached()
            self._capture.write(self._writer.trailer(version_digest(reached)))
            reader = DeltaReader(self._capture)
            deltas.apply(
                self._state, reader, reverse=True, tensors=reached, threads=self._replica.threads
            )
            check_state(self._state, self._before)
        except (WeightsError, OSError):
            return  # better no copy than a doubtful one
        self._replica.put(self._state, self._before)

    def _open(self, heads: Sequence[TensorHead]) -> None:
        """Compare the file's header with the manifest, and only then touch the copy."""
        manifest = self._manifest
        wanted = _forms(manifest.tensors)
        found = {name: f"{code}{list(shape)}" for name, code, shape in heads}
        for name in sorted(wanted.keys() | found.keys()):
            if wanted.get(name) != found.get(name):
                raise Corrupt(
                    f"tensor {name!r} in the keyframe of version {manifest.version}",
                    wanted.get(name, "absent"),
                    found.get(name, "absent"),
                )
        if self._replica.is_empty:
            self._state = {
                name: torch.empty(shape, dtype=dtype_of(code)) for name, code, shape in heads
            }
        else:
            self._state, self._before = self._replica.take()
        self._phase = "body"
        self._order = {name: index for index, (name, _, _) in enumerate(heads)}
        self._targets = {name: to_bits(tensor) for name, tensor in self._state.items()}
        self._digests = dict.fromkeys(self._order, 0)
        self._gains = dict.fromkeys(self._order, 0)
        if self._capture is not None:
            before = sorted(self._before, key=lambda spec: self._order[spec.name])
            self._capture.write(self._writer.header(version_digest(before), before))

    def _write(self, run: Run) -> None:
        target, index = self._targets[run.name], self._order[run.name]
        for start, length in spans(run.start, len(run.bits)):
            held = target[start : start + length]
            new = run.bits[start - run.start : start - run.start + length]
            if self._capture is not None:
                record = self._writer.block(index, start, held, new)
                if record is not None:
                    self._capture.write(record[0])
                    self._gains[run.name] += record[1]
            held[:] = new
            # Of what the copy holds now, not of what arrived: the way there is checked as well.
            self._digests[run.name] += self._kernels.digest(held, start)
            self._digests[run.name] &= MASK

    def _reached(self) -> tuple[TensorSpec, ...]:
        """Return the specs that the captured delta leads to, in the order of its header."""
        return tuple(
            spec.model_copy(
                update={"digest": to_hex((int(spec.digest, 16) + self._gains[spec.name]) & MASK)}
            )
            for spec in self._before
        )


def _forms(tensors: Sequence[TensorSpec]) -> dict[str, str]:
    return {spec.name: f"{spec.dtype}{list(spec.shape)}" for spec in tensors}
