"""What a service does with bytes from the bus: read them, or keep them where an operator looks.

A payload that can never be read is stored on `dead.<service>` with the reason and left behind; one
of another wire major is handed back, and the service says that it is not ready.
"""

from __future__ import annotations

import time
from typing import TypeVar

from shared.runtime.bus import Job
from shared.runtime.context import Context
from shared.wire.base import Message
from shared.wire.codec import decode, encode
from shared.wire.errors import ForeignMajor, Malformed, Oversized, UnexpectedType, WireError
from shared.wire.telemetry import DeadLetter

M = TypeVar("M", bound=Message)

KEPT_BYTES = 64 * 1024
"""Of an unreadable payload."""
FOREIGN_DELAY_S = 5.0
"""Before a job of another wire major is offered again."""
_FOREIGN = "another wire version: "


def reason_word(error: WireError) -> str:
    """Name the kind of refusal, for counters."""
    match error:
        case Oversized():
            return "oversized"
        case UnexpectedType():
            return "unexpected_type"
        case Malformed():
            return "malformed"
        case _:
            return "unreadable"


async def accept(
    context: Context, subject: str, seq: int, payload: bytes, *types: type[M]
) -> M | None:
    """Decode a payload, or store it as a dead letter and return None (then `term` a job).

    Idempotent by (subject, seq): a payload delivered again is kept once.

    Raises:
        ForeignMajor: hand it back with a delay; readiness is withdrawn until a message reads well.
    """
    try:
        message = decode(payload, *types)
    except ForeignMajor as error:
        context.count("foreign_messages")
        context.health.set_unready(f"{_FOREIGN}{error}")
        context.log.warning("foreign_message", subject=subject, seq=seq, reason=str(error))
        raise
    except WireError as error:
        await _bury(context, subject, seq, payload, error)
        return None
    if context.health.reason.startswith(_FOREIGN):
        context.health.set_ready()
    return message


async def accept_job(context: Context, job: Job, *types: type[M]) -> M | None:
    """Decode a job's payload; None when it was ended here, terminated or handed back."""
    record = job.record
    try:
        message = await accept(context, record.subject, record.seq, record.payload, *types)
    except ForeignMajor:
        await job.nak(FOREIGN_DELAY_S)
        return None
    if message is None:
        await job.term()
    return message


async def _bury(context: Context, subject: str, seq: int, payload: bytes, error: WireError) -> None:
    context.count("dead_letters")
    context.count(f"dead_letters_{reason_word(error)}")
    context.log.error("dead_letter", subject=subject, seq=seq, reason=str(error))
    letter = DeadLetter(
        service=context.role,
        origin=subject,
        origin_seq=seq,
        reason=str(error),
        payload=payload[:KEPT_BYTES],
        num_bytes=len(payload),
        dropped_at=time.time(),
    )
    # A core message has no sequence to know it by again.
    msg_id = f"dead-{context.role}-{subject}-{seq}" if seq else None
    await context.bus.append(context.bus.subjects.dead(context.role), encode(letter), msg_id=msg_id)
