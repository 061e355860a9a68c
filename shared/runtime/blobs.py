"""Payloads too large for one message: digest-named chunks first, a small pointer last.

The chunks are content-addressed, so storing them twice is harmless, and a crash before the pointer
leaves only orphans on the `blobs` stream. Chunks that were stored a while ago are stored again:
whoever sweeps what nothing points at (`services/learner/blob_sweep.py`) tells by their age that a
pointer may still be on its way.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from shared.wire.codec import content_digest, decode, encode
from shared.wire.errors import WireError
from shared.wire.subjects import Subjects
from shared.wire.telemetry import BlobRef

_MARK = b"BlobRef"
_MARK_WITHIN = 24
"""The type name lies in the first bytes of the envelope."""
_MAX_REF_BYTES = 256

AppendChunk = Callable[[str, bytes, str], Awaitable[int]]
"""(subject, chunk, message id) -> sequence."""
FetchChunk = Callable[[str], Awaitable[bytes | None]]


def needs_blob(payload: bytes, max_payload: int) -> bool:
    """Whether a payload is stored as chunks: above half of what the server accepts."""
    return len(payload) > max_payload // 2


def is_ref(payload: bytes) -> bool:
    """Cheap test, run on every stored message read, whether a payload may be a pointer."""
    return len(payload) <= _MAX_REF_BYTES and _MARK in payload[:_MARK_WITHIN]


def ref_of(payload: bytes) -> BlobRef | None:
    """Return the pointer that a stored payload is, None when it is none."""
    if not is_ref(payload):
        return None
    try:
        return decode(payload, BlobRef)
    except WireError:
        return None


async def store(payload: bytes, subjects: Subjects, max_payload: int, append: AppendChunk) -> bytes:
    """Store the chunks and return the encoded pointer."""
    digest = content_digest(payload)
    size = max(1, max_payload // 2)
    chunks = [payload[start : start + size] for start in range(0, len(payload), size)]
    for index, chunk in enumerate(chunks):
        # The id is of the content: within the server's duplicate window it is kept once.
        await append(subjects.blob(digest, index), chunk, f"{digest}.{index}")
    return encode(BlobRef(digest=digest, num_bytes=len(payload), num_chunks=len(chunks)))


async def resolve(payload: bytes, subjects: Subjects, fetch: FetchChunk) -> bytes | None:
    """Return what a pointer stands for; `payload` itself when it is none.

    None when chunks are gone or their digest differs.
    """
    ref = ref_of(payload)
    if ref is None:
        return payload
    parts: list[bytes] = []
    for index in range(ref.num_chunks):
        chunk = await fetch(subjects.blob(ref.digest, index))
        if chunk is None:
            return None
        parts.append(chunk)
    whole = b"".join(parts)
    return whole if content_digest(whole) == ref.digest else None
