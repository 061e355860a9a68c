"""One message between the service and an environment's process: length, then msgpack."""

from __future__ import annotations

import asyncio
import struct
from typing import Any, cast

import msgpack

_LENGTH = struct.Struct("!I")


class FrameTooLarge(Exception):
    """A message beyond the agreed size; the connection cannot be used any further."""

    def __init__(self, num_bytes: int, max_bytes: int) -> None:
        super().__init__(f"a message of {num_bytes} bytes, at most {max_bytes} are allowed")
        self.num_bytes = num_bytes


def pack(message: dict[str, Any]) -> bytes:
    """Return the bytes of one frame.

    Raises:
        TypeError: the message has something that is no plain data.
    """
    body = cast(bytes, msgpack.packb(message, use_bin_type=True))
    return _LENGTH.pack(len(body)) + body


async def read(reader: asyncio.StreamReader, max_bytes: int) -> dict[str, Any]:
    """Return the next message.

    Raises:
        EOFError: the other side is gone.
        FrameTooLarge: it announces more than `max_bytes`.
        ValueError: what came is not a message.
    """
    try:
        (num_bytes,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
        if num_bytes > max_bytes:
            raise FrameTooLarge(num_bytes, max_bytes)
        body = await reader.readexactly(num_bytes)
    except (asyncio.IncompleteReadError, ConnectionError) as error:
        raise EOFError("the connection ended") from error
    message: Any = msgpack.unpackb(body, raw=False)
    if not isinstance(message, dict):
        raise ValueError("a frame that holds no mapping")
    return cast("dict[str, Any]", message)
