"""Reading the retained manifest log."""

from __future__ import annotations

from dataclasses import dataclass

from shared.runtime.bus import Bus, Record
from shared.weights.fan_out import fan_out
from shared.wire.codec import decode
from shared.wire.errors import WireError
from shared.wire.weights import Manifest


@dataclass(frozen=True, slots=True)
class Logged:
    """A manifest and its sequence: the fence of the next one."""

    seq: int
    manifest: Manifest


async def read_head(bus: Bus) -> Logged | None:
    """Return the newest manifest, or None when nothing was ever published.

    Raises:
        WireError: it cannot be read by this version of the code.
    """
    record = await bus.last(bus.subjects.manifest)
    return None if record is None else Logged(record.seq, decode(record.payload, Manifest))


async def read_head_seq(bus: Bus) -> int:
    """Return the sequence of the newest manifest, 0 when nothing was ever published."""
    record = await bus.last(bus.subjects.manifest)
    return 0 if record is None else record.seq


async def read_retained(bus: Bus, *, strict: bool = False) -> list[Logged]:
    """Return every manifest still in the log, in order; unreadable ones are left out.

    Raises:
        WireError: with `strict`, when one of them cannot be read.
    """
    state = await bus.stream_state("manifests")
    first = max(1, state.first_seq)

    async def get(seq: int) -> Record | None:
        return await bus.get("manifests", seq)

    logged: list[Logged] = []
    for record in await fan_out(get, range(first, state.last_seq + 1), window=16):
        if record is None:
            continue
        try:
            logged.append(Logged(record.seq, decode(record.payload, Manifest)))
        except WireError:
            if strict:
                raise
            continue  # followers refuse and count it; retention needs readable ones only
    return logged
