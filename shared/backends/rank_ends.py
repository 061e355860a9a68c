"""One end of a line between two ranks: whole frames over TCP, and how a line begins."""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection

TOKEN_BYTES = 32
HELLO = struct.Struct(f"!{TOKEN_BYTES}sII")
"""Token of the job, rank, process id: what a follower sends first."""
BEAT, WORK, STOP, WORDS = b".", b"w", b"s", b"x"
"""Kinds of frames: beats both ways, commands and answers, the end, why a rank ends."""

_BEATS_PER_TIMEOUT = 5
_LONGEST_BEAT_S = 2.0


@dataclass(frozen=True)
class Address:
    """Where a follower finds the leader."""

    host: str
    port: int
    token: bytes


def beat_s(timeout_s: float) -> float:
    """Return the seconds between two beats where silence of `timeout_s` is a loss."""
    return min(_LONGEST_BEAT_S, timeout_s / _BEATS_PER_TIMEOUT)


class LineEnd:
    """One end of a line; whole frames, from any thread."""

    def __init__(self, connected: socket.socket, timeout_s: float) -> None:
        """Take over a connection; a send fails when the other end reads nothing for `timeout_s`."""
        connected.settimeout(None)
        seconds, rest = divmod(timeout_s, 1)
        bound = struct.pack("ll", int(seconds), int(rest * 1e6))
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, bound)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = connected
        self._frames: Connection = Connection(os.dup(connected.fileno()))
        self._sending = threading.Lock()
        self.heard_at = time.monotonic()

    def send(self, kind: bytes, payload: bytes = b"") -> None:
        """Send a frame.

        Raises:
            OSError: the other end is gone, or did not read in time, which ends the line: half a
                frame may be on its way.
        """
        with self._sending:
            try:
                self._frames.send_bytes(kind + payload)
            except OSError:
                self.cut()
                raise

    def receive(self) -> tuple[bytes, bytes]:
        """Wait for a frame; return its kind and payload.

        Raises:
            EOFError, OSError: the other end is gone.
        """
        frame = self._frames.recv_bytes()
        self.heard_at = time.monotonic()
        return frame[:1], frame[1:]

    def cut(self) -> None:
        """End the line; whoever waits on it is freed."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Give the descriptors back; the reader does, when the other end is gone."""
        self.cut()
        with self._sending:
            self._frames.close()
            self._socket.close()


def exactly(connected: socket.socket, size: int) -> bytes:
    """Read so many bytes.

    Raises:
        OSError: they did not come, or not in time.
    """
    found = b""
    while len(found) < size:
        part = connected.recv(size - len(found))
        if not part:
            raise ConnectionError("closed before it said who it is")
        found += part
    return found
