"""The append that allocates a version, and what stands in its way."""

from __future__ import annotations

from collections.abc import Container

from shared.runtime.bus import Bus
from shared.runtime.errors import BusUnavailable, Conflict, Fatal, Fenced
from shared.weights.manifest_log import Logged
from shared.weights.orphans import ORPHAN_AGE_S
from shared.wire.codec import decode, encode
from shared.wire.weights import Manifest


async def append_manifest(
    bus: Bus, manifest: Manifest, *, after: Logged | None, own_ids: Container[str]
) -> Logged:
    """Append `manifest` behind `after`; return the entry that now is the version.

    Args:
        bus: where to.
        manifest: of the next version.
        after: the head as the publisher knows it; None: there is none.
        own_ids: uploads of this publisher, whose append may have been stored without its knowing.

    Raises:
        Fenced: another publisher appended in between.
        Fatal: this publisher's own append of other bytes was stored.
        BusError: the bus refused or did not answer; the outcome is open.
        WireError: what was appended in between cannot be read.
    """
    subject = bus.subjects.manifest
    try:
        seq = await bus.append(
            subject,
            encode(manifest),
            expect_last_subject_seq=0 if after is None else after.seq,
            msg_id=manifest.upload_id,
        )
    except Conflict as conflict:
        record = await bus.last(subject)
        found = None if record is None else decode(record.payload, Manifest)
        if record is None or found is None or found.upload_id not in own_ids:
            owner = "nobody" if found is None else found.producer
            raise Fenced(
                f"version {manifest.version} was published by {owner}: "
                "another learner owns this run"
            ) from conflict
        if found.digest != manifest.digest:
            raise Fatal(
                f"version {found.version} is committed with digest {found.digest}; a number "
                f"is never reused for other bytes ({manifest.digest}): restart and replay"
            ) from conflict
        return Logged(record.seq, found)
    return Logged(seq, manifest)


def refuse_if_late(seconds: float, what: str) -> None:
    """Refuse to name an upload, begun so many seconds ago, that sweepers may have taken meanwhile.

    Raises:
        BusUnavailable: it took too long.
    """
    if seconds > ORPHAN_AGE_S / 2:
        raise BusUnavailable(f"{what}: the upload took too long, publish it again")
