"""From the rows that a server recorded to the records of an answer. No vLLM needed."""

from __future__ import annotations

from collections.abc import Iterable

from services.rollout.vllm_port import Recorded
from shared.wire.base import Array
from shared.wire.trajectory import RoutingRecord, Span


def records_of(
    recorded: Iterable[Recorded],
    spans: Iterable[Span],
    prefix_tokens: int,
    held: tuple[int, int] | None,
) -> tuple[RoutingRecord, ...]:
    """Return what the caller needs of the rows.

    Of every version that sampled a token of the answer the tokens before its last one, which are
    the context of what it sampled; of other versions nothing.

    Args:
        recorded: rows by label and token, in the order of computation.
        spans: stamps of the answer.
        prefix_tokens: of the request.
        held: (version, stop): rows [0, stop) of that version are left out.
    """
    ends = {span.version: prefix_tokens + span.stop - 1 for span in spans}
    version_held, stop_held = held or (-1, 0)
    records: list[RoutingRecord] = []
    for part in recorded:
        version = int(part.label)
        start = max(part.start, stop_held if version == version_held else 0)
        stop = min(part.start + len(part.experts), ends.get(version, 0))
        if start < stop:
            rows = part.experts[start - part.start : stop - part.start]
            experts = Array.of(rows, "u1" if rows.itemsize == 1 else "u2")
            records.append(RoutingRecord(version=version, start=start, stop=stop, experts=experts))
    return tuple(records)
