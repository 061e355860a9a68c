"""What the `weights:` section of the configuration makes of the parts of this package."""

from __future__ import annotations

import os

from shared.runtime.bus import Bus
from shared.runtime.logs import Log
from shared.runtime.sections import WeightsSection
from shared.weights.follower import Follower
from shared.weights.history import WeightHistory
from shared.weights.keyframe_store import KeyframeStore
from shared.weights.publisher import Publisher

MAX_THREADS = 8
"""Beyond it memory bandwidth, not cores, bounds diffing and applying."""


def num_threads(section: WeightsSection) -> int:
    """Return how many threads diff and apply: as configured, or one per usable core."""
    if section.threads:
        return section.threads
    # macOS has no affinity
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(MAX_THREADS, cores or 1)


def make_store(section: WeightsSection, bus: Bus) -> KeyframeStore | None:
    """Return the configured keyframe store, None when keyframes travel on the bus.

    Each run has a folder of its own there: one run must not sweep another's keyframes.

    Raises:
        ValueError: fsspec does not know the URL's protocol, or its package is not installed.
    """
    if not section.keyframe_store:
        return None
    url = f"{section.keyframe_store.rstrip('/')}/{bus.subjects.run}"
    return KeyframeStore(url, section.keyframe_store_options)


def make_history(section: WeightsSection, *, keep_past: bool) -> WeightHistory:
    """Return an empty history."""
    return WeightHistory(
        keep_past=keep_past, threads=num_threads(section), spool_bytes=section.spool_bytes
    )


def make_follower(
    section: WeightsSection,
    bus: Bus,
    history: WeightHistory,
    log: Log,
    *,
    chunk_timeout_s: float = 2.0,
    retry_s: float = 2.0,
) -> Follower:
    """Return a follower into `history`."""
    return Follower(
        bus,
        history,
        store=make_store(section, bus),
        log=log,
        spool_bytes=section.spool_bytes,
        chunk_timeout_s=chunk_timeout_s,
        retry_s=retry_s,
    )


def make_publisher(
    section: WeightsSection, bus: Bus, log: Log, *, model_id: str, producer: str
) -> Publisher:
    """Return a publisher; call its `start`."""
    return Publisher(
        bus,
        model_id=model_id,
        producer=producer,
        keyframe_every=section.keyframe_every,
        chunk_bytes=section.chunk_bytes,
        store=make_store(section, bus),
        threads=num_threads(section),
        log=log,
    )
