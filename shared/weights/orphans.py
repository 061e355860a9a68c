"""Chunks that no manifest names: left by publishers that died or were fenced too early."""

from __future__ import annotations

from shared.runtime.bus import Bus
from shared.weights.manifest_log import read_retained
from shared.weights.retention import upload_ids
from shared.wire.errors import WireError

ORPHAN_AGE_S = 900.0
"""Orphans are swept at this age; an upload older than half of it is not committed, for its chunks
could be gone before its manifest is there."""


async def sweep_orphans(bus: Bus, *, older_than: float) -> int:
    """Drop orphaned uploads stored before `older_than` (Unix seconds); return how many.

    Reads the chunk stream once: a task for start-up, not for every version.
    """
    state = await bus.stream_state("chunks")
    stored_at: dict[str, float] = {}
    for seq in range(max(1, state.first_seq), state.last_seq + 1):
        record = await bus.get("chunks", seq)
        if record is not None:
            stored_at[record.subject.split(".")[-2]] = record.stored_at
    named: set[str] = set()
    # Read after the chunks: whatever was appended meanwhile is named.
    try:
        for entry in await read_retained(bus, strict=True):
            named |= upload_ids(entry.manifest)
    except WireError:
        return 0  # what a newer publisher's manifest names cannot be told from an orphan
    orphans = [u for u, stored in stored_at.items() if u not in named and stored <= older_than]
    for upload_id in orphans:
        wildcard = f"{bus.subjects.prefix}.chunk.{upload_id}.*"
        await bus.purge("chunks", state.last_seq + 1, subject=wildcard)
    return len(orphans)
