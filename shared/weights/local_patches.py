"""Deltas in the coordinates of one rank: resolved once, applied to its device, and taken back.

A delta names elements by their flat index in the published tensors. `resolve` looks each of them up
in a layout; what remains is, per box, local positions and steps, which add modulo 2^width like on
the host: the device copy goes v -> v+1 and back without being loaded again, bit for bit.

Shapes: K changed elements of a box.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from shared.weights.bits import dtype_of
from shared.weights.deltas import Block, DeltaReader
from shared.weights.digests import MASK
from shared.weights.errors import WrongBase
from shared.weights.kernels.choice import kernels_for
from shared.weights.layouts import Layout, Placement
from shared.weights.local_digests import ShardDigests, contributions
from shared.weights.local_lookup import Lookup, Positions
from shared.weights.local_tensors import FlatView, LocalTensors, check_local

CHUNK = 1 << 20
"""Elements written at a time: 50 MB of scratch on the device."""


class LocalChange(NamedTuple):
    """What a delta changes in one box."""

    local: str
    placement: Placement
    positions: torch.Tensor
    """i4 or i8 [K]: flat, in the local tensor, all different."""
    source_positions: torch.Tensor
    """i4 or i8 [K]: flat, in the published tensor; the digest is made of them."""
    steps: torch.Tensor
    """signed integers [K] of the elements' width: new bits - old bits, modulo 2^width."""


@dataclass(frozen=True, slots=True)
class LocalPatch:
    """A delta resolved for one rank.

    It costs 8 bytes and an element per change (16 and an element in tensors beyond 2^31 elements):
    0.8 GB for 1 % of 8 billion bf16 weights. `apply_blocks` needs 10 MB instead and resolves anew
    each time.
    """

    layout: Layout
    dtypes: dict[str, str]
    """Published dtype code by source."""
    changes: tuple[LocalChange, ...]

    @property
    def num_bytes(self) -> int:
        return sum(
            tensor.numel() * tensor.element_size()
            for change in self.changes
            for tensor in (change.positions, change.source_positions, change.steps)
        )

    def to(self, device: torch.device) -> LocalPatch:
        """Return the patch on a device: what a pause of the engine need not wait for."""
        changes = tuple(
            change._replace(
                positions=change.positions.to(device),
                source_positions=change.source_positions.to(device),
                steps=change.steps.to(device),
            )
            for change in self.changes
        )
        return LocalPatch(self.layout, self.dtypes, changes)

    def apply(self, local: LocalTensors, *, reverse: bool = False) -> ShardDigests:
        """Take the rank's tensors forward, or back, in place.

        An exception after the first write leaves them between two versions: call it inside
        `DeviceVersion.writing`.

        Args:
            local: the engine's tensors, of any device and strides.
            reverse: from the delta's target to its base.

        Returns:
            What the digests of this rank's pieces gain, computed from what was really there: with
            all ranks, `check_digests` holds it against the manifests.

        Raises:
            ValueError: before anything is written; tensors that are not the layout's, or not in the
                published dtype.
        """
        check_local(local, self.layout, self.dtypes)
        return _written(self.changes, local, reverse)


def resolve(reader: DeltaReader, layout: Layout) -> LocalPatch:
    """Look up a delta in a layout. Blocks without an element of this rank are not decompressed.

    Raises:
        WrongBase: a delta of another model than the layout describes.
        Corrupt: a block that cannot be read.
    """
    resolver = _Resolver(reader, layout)
    found: dict[tuple[str, Placement], list[LocalChange]] = {}
    for block in reader.blocks():
        for change in resolver.changes(block):
            found.setdefault((change.local, change.placement), []).append(change)
    changes = tuple(_joined(parts) for parts in found.values())
    return LocalPatch(layout, resolver.dtypes, changes)


def apply_blocks(
    reader: DeltaReader, layout: Layout, local: LocalTensors, *, reverse: bool = False
) -> ShardDigests:
    """Resolve and apply block by block, in memory for one block; otherwise as `LocalPatch.apply`.

    Raises:
        WrongBase: before anything is written; a delta of another model.
        ValueError: before anything is written; as `LocalPatch.apply`.
        Corrupt: a block that cannot be read; those before it have been written.
    """
    resolver = _Resolver(reader, layout)
    check_local(local, layout, resolver.dtypes)
    digests = ShardDigests()
    for block in reader.blocks():
        digests.merge(_written(resolver.changes(block), local, reverse))
    return digests


class _Resolver:
    """Takes blocks of one delta apart for one layout."""

    def __init__(self, reader: DeltaReader, layout: Layout) -> None:
        published = {name: (dtype, tuple(shape)) for name, dtype, shape in reader.tensors}
        for name, shape in layout.sources.items():
            if name not in published:
                raise WrongBase(f"tensor {name!r}", "no such tensor", f"{list(shape)}")
            if published[name][1] != shape:
                raise WrongBase(f"tensor {name!r}", f"{list(published[name][1])}", f"{list(shape)}")
        self.dtypes = {name: published[name][0] for name in layout.sources}
        self._names = [name for name, _, _ in reader.tensors]
        self._widths = [dtype_of(dtype).itemsize for _, dtype, _ in reader.tensors]
        self._lookups: dict[str, list[Lookup]] = {}
        for local, placement in layout.placements():
            lookup = Lookup(local, placement, layout.tensors[local].shape)
            self._lookups.setdefault(placement.source, []).append(lookup)
        self._kernels = kernels_for(
            sum(
                int(np.prod(shape, dtype=np.int64)) * dtype_of(dtype).itemsize
                for dtype, shape in published.values()
            )
        )

    def changes(self, block: Block) -> Iterator[LocalChange]:
        """Yield what a block changes on this rank."""
        end = block.start + block.length
        lookups = [
            lookup
            for lookup in self._lookups.get(self._names[block.tensor_index], ())
            if lookup.first < end and block.start < lookup.end
        ]
        if not lookups:
            return
        width = self._widths[block.tensor_index]
        positions, steps = self._kernels.steps(block.coded(), block.length, width)
        positions = positions + block.start
        signed = steps.view(np.dtype(f"i{width}"))
        for lookup in lookups:
            chosen, local_positions = lookup.find(positions)
            if len(local_positions):
                yield LocalChange(
                    lookup.local,
                    lookup.placement,
                    _narrowed(local_positions),
                    _narrowed(positions[chosen]),
                    torch.from_numpy(signed[chosen].copy()),
                )


def _written(changes: Iterable[LocalChange], local: LocalTensors, reverse: bool) -> ShardDigests:
    digests = ShardDigests()
    with torch.inference_mode():
        for change in changes:
            gained = _write(change, local[change.local], reverse)
            digests.add(change.local, change.placement, gained)
    return digests


def _write(change: LocalChange, tensor: torch.Tensor, reverse: bool) -> int:
    """Change one box; return what its digest gains (u64)."""
    flat = FlatView(tensor)
    gained = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, len(change.steps), CHUNK):
        part = slice(start, start + CHUNK)
        positions = change.positions[part].to(tensor.device, torch.int64)
        indices = change.source_positions[part].to(tensor.device, torch.int64)
        steps = change.steps[part].to(tensor.device)
        old = flat.read(positions)
        new = old - steps if reverse else old + steps
        flat.write(positions, new)
        gained += contributions(indices, new) - contributions(indices, old)
    # Waits for the device, so that a failed write is seen here and not under a version label.
    return int(gained.item()) & MASK


def _joined(parts: list[LocalChange]) -> LocalChange:
    if len(parts) == 1:
        return parts[0]
    return parts[0]._replace(
        positions=torch.cat([part.positions for part in parts]),
        source_positions=torch.cat([part.source_positions for part in parts]),
        steps=torch.cat([part.steps for part in parts]),
    )


def _narrowed(positions: Positions) -> torch.Tensor:
    """Return positions as i4 where they fit, which is nearly everywhere, else as i8."""
    fits = not len(positions) or int(positions.max()) < 1 << 31
    return torch.from_numpy(positions.astype(np.int32 if fits else np.int64))
