"""Taking in payloads: what cannot be read is kept with the reason, and the service goes on."""

from __future__ import annotations

import time
from typing import TypeVar

from shared.runtime.context import Context
from shared.wire.base import Message
from shared.wire.codec import decode, encode
from shared.wire.errors import ForeignMajor, WireError
from shared.wire.telemetry import DeadLetter

M = TypeVar("M", bound=Message)

_KEPT_BYTES = 64 * 1024


async def accept(
    context: Context, subject: str, seq: int, payload: bytes, *types: type[M]
) -> M | None:
    """Decode a payload into one of `types`, or dead-letter it and return None.

    The caller then ends the delivery for good (`Job.term`, or reading on).

    Raises:
        ForeignMajor: another major version wrote it: the service is unready now; hand the payload
            back with delay, an upgraded reader will take it.
        BusError: the dead letter could not be stored.
    """
    try:
        return decode(payload, *types)
    except ForeignMajor as error:
        context.health.set_unready(str(error))
        context.count("foreign_major")
        raise
    except WireError as error:
        context.count("dead_letters")
        context.count(f"dead_letters_{type(error).__name__.lower()}")
        context.log.warning("dead_letter", subject=subject, seq=seq, reason=str(error))
        letter = DeadLetter(
            service=context.role,
            origin=subject,
            origin_seq=seq,
            reason=str(error),
            payload=payload[:_KEPT_BYTES],
            num_bytes=len(payload),
            dropped_at=time.time(),
        )
        await context.bus.append(context.bus.subjects.dead(context.role), encode(letter))
        return None
