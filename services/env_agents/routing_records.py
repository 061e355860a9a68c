"""The routing of one sequence as its answers brought it: what is held, joined, and refused.

Positions count from the start of the sequence. Nothing here reads the experts themselves.
"""

from __future__ import annotations

from collections.abc import Sequence

from shared.wire.base import Array
from shared.wire.messages import RoutingHeld
from shared.wire.trajectory import RoutingRecord, recorded_stop


def held(records: Sequence[RoutingRecord]) -> RoutingHeld | None:
    """Return the newest version recorded, and up to which token without a gap from the first."""
    newest = max((record.version for record in records), default=-1)
    stop = recorded_stop(records, newest)
    return RoutingHeld(version=newest, stop=stop) if stop else None


def lacking(
    new: Sequence[RoutingRecord], known: Sequence[RoutingRecord]
) -> tuple[RoutingRecord, ...]:
    """Return the new records without rows that their version has recorded before.

    An engine at another version than the newest one held sends all rows: with pods that lag behind
    an episode would else carry its prefix once per change, not once per version. The first record
    of a token counts, so nothing is lost.
    """
    kept: list[RoutingRecord] = []
    for record in new:
        start = max(record.start, recorded_stop([*known, *kept], record.version))
        if start < record.stop:
            kept.append(record if start == record.start else _from(record, start))
    return tuple(kept)


def joined(records: Sequence[RoutingRecord]) -> tuple[RoutingRecord, ...]:
    """Return the same records in the same order; those that continue one another are one."""
    runs: list[list[RoutingRecord]] = []
    for record in records:
        if runs and _continues(record, runs[-1][-1]):
            runs[-1].append(record)
        else:
            runs.append([record])
    return tuple(run[0] if len(run) == 1 else _one(run) for run in runs)


def flaw(new: Sequence[RoutingRecord], num_tokens: int, known: Sequence[RoutingRecord]) -> str:
    """Return why records cannot be of a sequence of `num_tokens` that has the `known` ones."""
    for record in new:
        if record.stop > num_tokens:
            return f"answered with routing up to token {record.stop} of {num_tokens}"
        if known and record.experts.shape[1:] != known[0].experts.shape[1:]:
            return "answered with routing of another model than before"
    return ""


def _from(record: RoutingRecord, start: int) -> RoutingRecord:
    rows = Array.of(record.experts.numpy()[start - record.start :], record.experts.dtype)
    return record.model_copy(update={"start": start, "experts": rows})


def _continues(record: RoutingRecord, last: RoutingRecord) -> bool:
    same = record.version == last.version and record.experts.dtype == last.experts.dtype
    return same and record.start == last.stop


def _one(run: list[RoutingRecord]) -> RoutingRecord:
    start, stop, first = run[0].start, run[-1].stop, run[0].experts
    shape = (stop - start, *first.shape[1:])
    experts = Array(dtype=first.dtype, shape=shape, data=b"".join(r.experts.data for r in run))
    return RoutingRecord(version=run[0].version, start=start, stop=stop, experts=experts)
