"""Bytes <-> messages: msgpack envelope `{w: [major, minor], t: type, b: body}`."""

from __future__ import annotations

import hashlib
from typing import Any, TypeVar, cast

import msgpack
from pydantic import ValidationError

from shared.wire.base import Message
from shared.wire.errors import Malformed, Oversized, UnexpectedType
from shared.wire.versioning import WIRE_VERSION, check_readable

M = TypeVar("M", bound=Message)

MAX_BYTES = 256 * 1024 * 1024
"""Bound on any decoded payload; chunked content above half of max_payload included."""


def encode(message: Message) -> bytes:
    """Serialise one message; the same message gives the same bytes."""
    envelope = {"w": WIRE_VERSION, "t": type(message).__name__, "b": message.model_dump()}
    return cast(bytes, msgpack.packb(envelope, use_bin_type=True))


def decode(payload: bytes, *accepted: type[M], bound_bytes: int = MAX_BYTES) -> M:
    """Parse a payload into one of the `accepted` message types.

    Unknown fields are ignored (a newer minor may have added them); everything else is strict.

    Raises:
        WireError: and nothing else, whatever the bytes.
    """
    if len(payload) > bound_bytes:
        raise Oversized(len(payload), bound_bytes)
    envelope = _unpack(payload)
    check_readable(_wire_version(envelope.get("w")))
    type_name = envelope.get("t")
    by_name = {cls.__name__: cls for cls in accepted}
    if not isinstance(type_name, str) or type_name not in by_name:
        raise UnexpectedType(str(type_name)[:80], tuple(by_name))
    try:
        return by_name[type_name].model_validate(envelope.get("b"), extra="ignore")
    except (ValidationError, RecursionError) as error:
        raise Malformed(f"{type_name}: {_first_problem(error)}") from error


def content_digest(payload: bytes) -> str:
    """Digest that scores and journal entries use to name a stored payload: blake2b-128, hex."""
    return hashlib.blake2b(payload, digest_size=16).hexdigest()


def _unpack(payload: bytes) -> dict[str, Any]:
    try:
        envelope = msgpack.unpackb(payload, raw=False, use_list=False, strict_map_key=True)
    except Exception as error:
        raise Malformed(f"not msgpack: {type(error).__name__}: {error}"[:200]) from error
    if not isinstance(envelope, dict):
        raise Malformed(f"envelope is {type(envelope).__name__}, not a map")
    return cast("dict[str, Any]", envelope)


def _wire_version(value: object) -> tuple[int, int]:
    match value:
        case (int(major), int(minor)):
            return major, minor
        case _:
            raise Malformed("no wire version")


def _first_problem(error: Exception) -> str:
    if isinstance(error, ValidationError):
        problem = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in problem["loc"])
        return f"{where}: {problem['msg']}"[:300]
    return type(error).__name__
