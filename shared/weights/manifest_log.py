"""Reading the retained manifest log: manifests and the keyframes announced after them."""

from __future__ import annotations

from dataclasses import dataclass, field

from shared.runtime.bus import Bus, Record
from shared.weights.fan_out import fan_out
from shared.wire.codec import decode
from shared.wire.errors import WireError
from shared.wire.weights import Artefact, Keyframe, Manifest

_WINDOW = 16


@dataclass(frozen=True, slots=True)
class Logged:
    """A manifest and its sequence: the fence of the next one."""

    seq: int
    manifest: Manifest


@dataclass(frozen=True, slots=True)
class RetainedLog:
    """What the log still holds, in log order."""

    manifests: list[Logged] = field(default_factory=list[Logged])
    keyframes: list[Keyframe] = field(default_factory=list[Keyframe])
    """Records, also of versions whose manifest is gone."""

    def upload_ids(self) -> frozenset[str]:
        """Return every upload that is named: on the chunk stream or in the keyframe store."""
        manifests = [entry.manifest for entry in self.manifests]
        of_manifests = [a for m in manifests for a in (m.delta, m.keyframe) if a is not None]
        artefacts: list[Artefact] = [*of_manifests, *(k.artefact for k in self.keyframes)]
        return frozenset(artefact.upload_id for artefact in artefacts)


async def read_head(bus: Bus) -> Logged | None:
    """Return the newest manifest, or None when nothing was ever published.

    Raises:
        WireError: it cannot be read by this version of the code.
    """
    record = await bus.last(bus.subjects.manifest)
    return None if record is None else Logged(record.seq, decode(record.payload, Manifest))


async def read_end(bus: Bus) -> int:
    """Return the sequence of the newest entry of either kind, 0 when there is none."""
    ends = [await bus.last(bus.subjects.manifest), await bus.last(bus.subjects.keyframe)]
    return max((record.seq for record in ends if record is not None), default=0)


async def read_log(bus: Bus, *, strict: bool = False) -> RetainedLog:
    """Return everything still in the log; unreadable entries are left out.

    Raises:
        WireError: with `strict`, when one of them cannot be read.
    """
    state = await bus.stream_state("manifests")
    first = max(1, state.first_seq)

    async def get(seq: int) -> Record | None:
        return await bus.get("manifests", seq)

    log = RetainedLog()
    for record in await fan_out(get, range(first, state.last_seq + 1), window=_WINDOW):
        if record is None:
            continue
        try:
            entry = decode(record.payload, Manifest, Keyframe)
        except WireError:
            if strict:
                raise
            continue  # followers refuse and count it; retention needs readable ones only
        if isinstance(entry, Manifest):
            log.manifests.append(Logged(record.seq, entry))
        else:
            log.keyframes.append(entry)
    return log


async def read_named_uploads(bus: Bus) -> frozenset[str] | None:
    """Return every upload that is named, None when an entry cannot be read and may name more."""
    try:
        return (await read_log(bus, strict=True)).upload_ids()
    except WireError:
        return None
