"""Uploads that nobody names: left by publishers that died, were fenced, or had to try again."""

from __future__ import annotations

import asyncio
from collections.abc import Collection

from shared.runtime.bus import Bus
from shared.weights.keyframe_store import KeyframeStore

ORPHAN_AGE_S = 900.0
"""Orphans are swept at this age; an upload older than half of it is not committed, for its chunks
could be gone before its manifest is there."""


async def sweep_orphans(
    bus: Bus, store: KeyframeStore | None, *, named: Collection[str] | None, older_than: float
) -> int:
    """Drop uploads that nobody names and that ended before `older_than`; return how many.

    Costs one listing of subjects and one chunk per upload that is not named.

    Args:
        bus: holds the chunks.
        store: holds keyframes that are files, when one is configured.
        named: upload ids of all retained manifests and keyframe records. None: not all of them
            could be read, so nothing can be told from an orphan and nothing is swept.
        older_than: Unix seconds. Uploads not named yet must be younger than this, those of the
            caller and those of a publisher that may have replaced it.

    Raises:
        BusError: the bus refused or did not answer.
        OSError: the store cannot be listed or written.
    """
    if named is None:
        return 0
    orphans = set(await _sweep_chunks(bus, named, older_than))
    if store is not None:
        files = await asyncio.to_thread(store.list)
        for upload_id, modified_at in files.items():
            if upload_id not in named and modified_at <= older_than:
                await asyncio.to_thread(store.delete, upload_id)
                orphans.add(upload_id)
    return len(orphans)


async def _sweep_chunks(bus: Bus, named: Collection[str], older_than: float) -> list[str]:
    # Before anything is judged: what is appended from now on stays, whatever its subject.
    state = await bus.stream_state("chunks")
    newest: dict[str, int] = {}
    prefix = f"{bus.subjects.prefix}.chunk."
    for subject in await bus.subjects_of("chunks", f"{prefix}*.*"):
        (upload_id, _, index) = subject.removeprefix(prefix).partition(".")
        if upload_id not in named:
            newest[upload_id] = max(int(index), newest.get(upload_id, 0))
    orphans: list[str] = []
    for upload_id, index in newest.items():
        # Chunks are stored nearly in order, so that the last one tells when the upload stopped.
        record = await bus.last(bus.subjects.chunk(upload_id, index))
        if record is not None and record.stored_at <= older_than:
            await bus.purge("chunks", state.last_seq + 1, subject=f"{prefix}{upload_id}.*")
            orphans.append(upload_id)
    return orphans
