"""Which experts a request's tokens took, by the version that computed them. No vLLM needed.

The rows of all tokens in the cache lie by cache slot, as their keys and values do: a prefix found
in the cache brings its rows along, and a row lives as long as its block. They are copied out when a
request may lose its blocks (it ended, was preempted, or the weights change) or when they are asked
for; what a version computed of it before an update is kept under that version.

Shapes: T tokens of a step, S slots, L layers with experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

Rows = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]
BlocksOf = Callable[[str], Sequence[int]]


class SlotRows:
    """Rows [S, L, K] on the device, one per slot of the cache.

    Args:
        shape: S, L, K.
        num_experts: 256 fit a byte; more take two.
    """

    def __init__(self, shape: Sequence[int], num_experts: int, device: torch.device) -> None:
        self._wide = num_experts > 256
        # Indexing the unsigned 16-bit type is not implemented: the bits are the same.
        dtype = torch.int16 if self._wide else torch.uint8
        self._rows_SLK = torch.zeros(shape, dtype=dtype, device=device)

    def put(self, slots_T: torch.Tensor, rows_TLK: torch.Tensor) -> None:
        """Write the rows of one step."""
        self._rows_SLK[slots_T] = rows_TLK.to(self._rows_SLK.dtype)

    def take(self, slots_T: npt.NDArray[np.int64]) -> Rows:
        """Copy rows to the host: u1 or u2 [T, L, K]."""
        slots = torch.from_numpy(slots_T).to(self._rows_SLK.device)
        rows = self._rows_SLK[slots].cpu().numpy()
        return rows.view(np.uint16) if self._wide else rows


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """Rows of tokens [start, start + T) of a request, computed under one version."""

    label: str
    start: int
    rows: Rows

    @property
    def stop(self) -> int:
        return self.start + len(self.rows)


@dataclass(slots=True)
class _Open:
    key: str
    held: tuple[str, int]
    start: int = 0
    stop: int = 0
    """Tokens [start, stop) are in the request's blocks, computed under the label in use."""
    kept: list[Segment] = field(default_factory=list[Segment])
    taken: bool = False


class RoutingRecorder:
    """Follows requests through steps, preemptions and updates.

    Args:
        slots: rows by cache slot.
        block_tokens: slots of a block.
        blocks_of: blocks of a request that was forwarded and has not ended, in order.
        max_ended: of ended requests whose rows nobody took, so many are remembered.
    """

    def __init__(
        self, slots: SlotRows, block_tokens: int, blocks_of: BlocksOf, max_ended: int
    ) -> None:
        self._slots = slots
        self._block_tokens = block_tokens
        self._blocks_of = blocks_of
        self._max_ended = max_ended
        self._label = ""
        self._open: dict[str, _Open] = {}
        self._ids: dict[str, str] = {}
        """Request id by key."""
        self._ended: dict[str, list[Segment]] = {}

    def forwarded(
        self,
        request_id: str,
        key: str,
        begin: int,
        stop: int,
        *,
        anew: bool,
        held: tuple[str, int] | None = None,
    ) -> None:
        """Take in that a step computed tokens [begin, stop) of a request.

        Args:
            request_id: of vLLM.
            key: under which its rows are taken.
            begin: first token of the step; those before it are in the cache.
            stop: end of the step's tokens.
            anew: its blocks are new to it: what lies before `begin` was found in the cache.
            held: (label, stop): rows [0, stop) that whoever takes them has: they are not copied.
        """
        entry = self._open.get(request_id)
        if entry is None:
            entry = self._open[request_id] = _Open(key, held or ("", 0))
            self._ids[key] = request_id
        if entry.stop == 0:
            entry.start = 0 if anew else begin
        entry.stop = stop

    def put(self, slots_T: torch.Tensor, rows_TLK: torch.Tensor) -> None:
        """Write the rows of a step's tokens, recorded or not: others may find them cached."""
        self._slots.put(slots_T, rows_TLK)

    def lose_blocks(self, request_id: str) -> None:
        """Copy out what a request has before its blocks are another's."""
        entry = self._open.get(request_id)
        if entry is None or entry.taken:
            return
        same = [segment.stop for segment in entry.kept if segment.label == self._label]
        if entry.held[0] == self._label:
            same.append(entry.held[1])
        start = max([entry.start, *same])  # a second prefill says what the first one said
        if start < entry.stop:
            rows = self._slots.take(self._slots_of(request_id, start, entry.stop))
            entry.kept.append(Segment(self._label, start, rows))
        entry.start = entry.stop = 0

    def end(self, request_id: str) -> None:
        """A request ended; its blocks are still what they were."""
        self.lose_blocks(request_id)
        entry = self._open.pop(request_id, None)
        if entry is None:
            return
        self._ids.pop(entry.key, None)
        if not entry.taken:
            self._ended[entry.key] = entry.kept
        while len(self._ended) > self._max_ended:
            self._ended.pop(next(iter(self._ended)))

    def take(self, key: str) -> list[Segment]:
        """Return and forget the rows of a request that ended, in the order they were computed."""
        request_id = self._ids.get(key)
        if request_id is None:
            return self._ended.pop(key, [])
        # It ended, and the step that would say so has not come.
        self.lose_blocks(request_id)
        entry = self._open[request_id]
        entry.taken, kept, entry.kept = True, entry.kept, []
        return kept

    def begin_update(self) -> None:
        """Keep what is in use under the label in use, which is about to change."""
        for request_id in self._open:
            self.lose_blocks(request_id)

    def finish_update(self, label: str) -> None:
        """Later tokens are computed under `label`."""
        self._label = label

    def _slots_of(self, request_id: str, start: int, stop: int) -> npt.NDArray[np.int64]:
        blocks = np.asarray(self._blocks_of(request_id), dtype=np.int64)
        tokens = np.arange(start, stop)
        within = tokens % self._block_tokens
        return blocks[tokens // self._block_tokens] * self._block_tokens + within
