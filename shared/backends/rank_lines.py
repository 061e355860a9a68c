"""A line from the leader to each follower: commands down, answers up, beats both ways.

Beats travel beside whatever the ranks compute, so that a dead or frozen process is noticed and
named at any time: idle, or while the others wait for it inside a collective. Lines carry small
control data; tensors go over a process group (`rank_codec.py`).

The peers are processes of one job. Whoever connects must know the job's token, which the leader
hands out over the process group; only then is anything unpickled.
"""

from __future__ import annotations

import hmac
import os
import queue
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from shared.backends.rank_ends import (
    BEAT,
    HELLO,
    STOP,
    TOKEN_BYTES,
    WORDS,
    WORK,
    Address,
    LineEnd,
    beat_s,
    exactly,
)

LOSS_S = 3.0
"""What a lost rank breaks elsewhere shows at once; the loss is known at the latest this much later.
"""
STOP_S = 5.0
"""So long a follower that was told to stop may still need to come to its end."""


class LeaderLines:
    """The leader's ends. Ranks are numbered from 1."""

    def __init__(self, num_followers: int, *, host: str, timeout_s: float) -> None:
        """Listen.

        Args:
            num_followers: how many will connect.
            host: of the interface; empty: all of them, for ranks on other machines.
            timeout_s: a follower silent for so long is lost. On this machine it is also killed: a
                frozen process does not hear its launcher.
        """
        self._num = num_followers
        self._one_machine = bool(host)
        self._pids: dict[int, int] = {}
        self._timeout_s = timeout_s
        both = not host and socket.has_dualstack_ipv6()
        self._server = socket.create_server(
            (host, 0),
            family=socket.AF_INET6 if both else socket.AF_INET,
            backlog=num_followers + 8,
            dualstack_ipv6=both,
        )
        self.port: int = self._server.getsockname()[1]
        self.token = secrets.token_bytes(TOKEN_BYTES)
        self._ends: dict[int, LineEnd] = {}
        self._answers: dict[int, queue.Queue[bytes | None]] = {}
        self._words: dict[int, str] = {}
        self._closing = False
        self._losing = threading.Lock()
        self.lost = threading.Event()
        self.reason = ""
        """Which rank was lost first, and how; empty while all are there."""

    @property
    def ranks(self) -> range:
        return range(1, self._num + 1)

    def accept(self) -> None:
        """Wait for all followers.

        Raises:
            TimeoutError: names the ranks that did not come.
        """
        deadline = time.monotonic() + self._timeout_s
        with self._server:
            while len(self._ends) < self._num:
                self._server.settimeout(max(0.01, deadline - time.monotonic()))
                try:
                    connected, _ = self._server.accept()
                except TimeoutError:
                    missing = ", ".join(str(r) for r in self.ranks if r not in self._ends)
                    for end in self._ends.values():
                        end.close()
                    raise TimeoutError(
                        f"rank {missing} did not connect within {self._timeout_s:g} s"
                    ) from None
                rank, pid = self._introduced(connected)
                if not rank:
                    connected.close()
                    continue
                self._pids[rank] = pid
                self._ends[rank] = LineEnd(connected, self._timeout_s)
                self._answers[rank] = queue.Queue()
        for rank, end in self._ends.items():
            _start(self._read, rank, end)
        _start(self._beat)

    def send(self, payload: bytes) -> None:
        """Send a command to every follower; one that is gone is found by its reader."""
        for end in self._ends.values():
            with suppress(OSError):
                end.send(WORK, payload)

    def answer(self, rank: int, timeout_s: float) -> bytes | None:
        """Return the follower's next answer; None: not in time, or some rank is lost."""
        with suppress(queue.Empty):
            return self._answers[rank].get(timeout=timeout_s)
        return None

    def stop(self) -> None:
        """Tell every follower to end; their silence is expected from now on."""
        self._closing = True
        for end in self._ends.values():
            with suppress(OSError):
                end.send(STOP)

    def _introduced(self, connected: socket.socket) -> tuple[int, int]:
        """Return rank and process id of who connected; 0, 0: a stranger."""
        connected.settimeout(min(5.0, self._timeout_s))
        try:
            hello = exactly(connected, HELLO.size)
        except OSError:
            return 0, 0
        token, rank, pid = HELLO.unpack(hello)
        known = hmac.compare_digest(token, self.token) and rank in self.ranks
        return (rank, pid) if known and rank not in self._ends else (0, 0)

    def _read(self, rank: int, end: LineEnd) -> None:
        while True:
            try:
                kind, payload = end.receive()
            except (EOFError, OSError):
                words = self._words.get(rank)
                end.close()
                self._lose(rank, words or "its process ended")
                return
            if kind == WORK:
                self._answers[rank].put(payload)
            elif kind == WORDS:
                self._words[rank] = payload.decode(errors="replace")

    def _beat(self) -> None:
        while not (self.lost.is_set() or self._closing):
            now = time.monotonic()
            for rank, end in self._ends.items():
                with suppress(OSError):
                    end.send(BEAT)
                if now - end.heard_at > self._timeout_s:
                    self._lose(rank, f"silent for {self._timeout_s:g} s")
                    if self._one_machine:
                        with suppress(OSError):
                            os.kill(self._pids[rank], signal.SIGKILL)
                    return
            time.sleep(beat_s(self._timeout_s))

    def _lose(self, rank: int, how: str) -> None:
        """Note the first loss; the other ranks, of no use without this one, are told to end."""
        with self._losing:
            if self.lost.is_set() or self._closing:
                return
            self.reason = f"rank {rank}: {how}"
            self.lost.set()
        for answers in self._answers.values():
            answers.put(None)
        for other, end in self._ends.items():
            if other == rank:
                end.cut()
            else:
                with suppress(OSError):
                    end.send(STOP)


class FollowerLine:
    """A follower's end."""

    def __init__(
        self, rank: int, address: Address, *, timeout_s: float, leave: Callable[[str], None]
    ) -> None:
        """Connect.

        Args:
            rank: this process's, at least 1.
            address: the leader's.
            timeout_s: a leader silent for so long is gone.
            leave: ends this process, from whatever thread; an empty reason: as it was told.

        Raises:
            OSError: nothing answers there.
        """
        connected = socket.create_connection((address.host, address.port), timeout=timeout_s)
        connected.sendall(HELLO.pack(address.token, rank, os.getpid()))
        self._end = LineEnd(connected, timeout_s)
        self._timeout_s = timeout_s
        self._leave = leave
        self._commands: queue.Queue[bytes | None] = queue.Queue()
        self._told = threading.Event()
        self._ended = threading.Event()
        _start(self._read)
        _start(self._beat)

    def command(self) -> bytes | None:
        """Wait for the next command; None: stop.

        Not bounded by itself: a leader that is gone or frozen ends the process (`leave`).
        """
        command = self._commands.get()
        if command is None:
            self._ended.set()
        return command

    def answer(self, payload: bytes) -> None:
        """Answer the command; a leader that is gone is found by the reader."""
        with suppress(OSError):
            self._end.send(WORK, payload)

    def last_words(self, text: str) -> bool:
        """Say why this process is about to end.

        Returns:
            Whether the leader had all ranks end meanwhile: another one was lost before.
        """
        with suppress(OSError):
            self._end.send(WORDS, text.encode())
        if not self._told.wait(LOSS_S):
            return False
        self._ended.set()
        return True

    def _read(self) -> None:
        while True:
            try:
                kind, payload = self._end.receive()
            except (EOFError, OSError):
                self._end.close()
                if not self._ended.is_set():
                    self._leave("the leader is gone")
                return
            if kind == WORK:
                self._commands.put(payload)
            elif kind == STOP:
                self._told.set()
                self._commands.put(None)
                stopped = self._ended.wait(STOP_S)
                self._end.close()
                if not stopped:
                    self._leave("")  # inside a collective that nobody will complete
                return

    def _beat(self) -> None:
        while not self._ended.is_set():
            with suppress(OSError):
                self._end.send(BEAT)
            if time.monotonic() - self._end.heard_at > self._timeout_s:
                self._leave(f"the leader has been silent for {self._timeout_s:g} s")
            time.sleep(beat_s(self._timeout_s))


def _start(work: Callable[..., None], *arguments: object) -> None:
    threading.Thread(target=work, args=arguments, daemon=True, name="rank-line").start()
