"""Backends on the ranks of one job, in the hands of rank 0.

`open_ranks` gives a service what builds its backends: `Alone` on one process, the `Leader` of
several. Rank 0 decides; every other rank performs its commands (`rank_follower.py`) and knows
nothing else of the run.
"""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, Protocol, TypeVar, cast

import torch
import torch.distributed as dist

from shared.backends.base import Backend
from shared.backends.building import BackendSpec, Device, build, device_of
from shared.backends.led_backend import LedBackend
from shared.backends.rank_codec import GroupPath, TensorPath, dumps
from shared.backends.rank_commands import Answer, Command, RanksFailed
from shared.backends.rank_ends import Address
from shared.backends.rank_lines import LOSS_S, LeaderLines
from shared.backends.rank_world import World, join

T = TypeVar("T")

BUILD = "build"
"""The command that makes a new backend."""


class Ranks(Protocol):
    """What a service builds its backends with."""

    @property
    def reason(self) -> str:
        """Why the backends are of no use any more; empty while they are."""
        ...

    def build(self, spec: BackendSpec) -> Backend:
        """Build a backend on all ranks and load its model.

        Raises:
            ValueError: the model, its layout or the device cannot be used; one line.
            OSError: the model directory cannot be read.
            RanksFailed: a rank was lost.
        """
        ...

    def close(self) -> None:
        """Let the other ranks end."""
        ...


class Alone:
    """One process."""

    reason = ""

    def __init__(self, device: torch.device, timeout_s: float) -> None:
        self._device = device
        self._timeout_s = timeout_s

    def build(self, spec: BackendSpec) -> Backend:
        """Build it here."""
        if spec.kind == "megatron":
            join(World(), self._device, timeout_s=self._timeout_s)
        return build(spec, self._device)

    def close(self) -> None:
        return


class Leader:
    """Rank 0 of several; its backends may be used from any thread."""

    def __init__(
        self,
        lines: LeaderLines,
        path: TensorPath,
        build_here: Callable[[BackendSpec], Backend],
        *,
        timeout_s: float,
    ) -> None:
        """Lead ranks that are connected.

        Args:
            lines: to every follower.
            path: for tensors, to every follower.
            build_here: makes rank 0's part of a backend.
            timeout_s: how long ranks may be apart inside one command.
        """
        self._lines = lines
        self._path = path
        self._build_here = build_here
        self._timeout_s = timeout_s
        self._one_at_a_time = threading.Lock()
        self._failed = ""
        self._num_backends = 0

    @property
    def reason(self) -> str:
        """Which rank was lost or disagreed, and how; empty while all is well."""
        return self._failed or self._lines.reason

    def build(self, spec: BackendSpec) -> Backend:
        """Build a backend on all ranks (see `Ranks`)."""
        number, self._num_backends = self._num_backends, self._num_backends + 1
        command = Command(number, BUILD, (spec,))
        local, _ = self.perform(command, lambda: self._build_here(spec))
        return LedBackend(self, number, local)

    def close(self) -> None:
        """Let the followers end."""
        self._lines.stop()

    def perform(
        self,
        command: Command,
        here: Callable[[], T],
        after: Iterable[torch.Tensor] = (),
    ) -> tuple[T, list[Any]]:
        """Perform a command on all ranks.

        Args:
            command: what the followers do.
            here: rank 0's part.
            after: tensors to hand out one at a time after the command.

        Returns:
            What `here` returned, and the followers' answers by rank.

        Raises:
            RanksFailed: a rank was lost or did otherwise than the others; nothing works any more.
            Exception: what `here` raised; of a ValueError or OSError that all ranks raised,
                nothing has changed.
        """
        payload, apart = dumps(command)
        with self._one_at_a_time:
            if self.reason:
                raise RanksFailed(self.reason)
            self._lines.send(payload)
            try:
                for tensor in apart:
                    self._path.send(tensor)
                for tensor in after:
                    self._path.send(tensor)
                result = here()
            except Exception as error:
                self._explain(command.method, error)
                raise
            return result, [answer.value for answer in self._agreed(command.method)]

    def _agreed(self, method: str) -> list[Answer]:
        """Return the answers of ranks that did what rank 0 did."""
        answers = self._answers(self._timeout_s)
        for rank, answer in zip(self._lines.ranks, answers, strict=True):
            if answer is None:
                late = f"rank {rank}: did not end {method} within {self._timeout_s:g} s of rank 0"
                self._fail(self._lines.reason or late)
            if answer is not None and answer.refusal:
                self._fail(f"rank {rank}: {method}: {answer.refusal}")
        return [answer for answer in answers if answer is not None]

    def _explain(self, method: str, error: Exception) -> None:
        """Say whether ranks still agree after rank 0 failed.

        Raises:
            RanksFailed: a lost rank is the cause.
        """
        refused = isinstance(error, ValueError | OSError)
        answers = self._answers(LOSS_S) if refused else []
        if answers and all(answer is not None and answer.refusal for answer in answers):
            return
        self._lines.lost.wait(LOSS_S)
        if self._lines.reason:
            raise RanksFailed(self._lines.reason) from error
        text = " ".join(str(error).split())[:300]
        self._failed = f"rank 0: {method}: {text or type(error).__name__}"
        if not refused:
            raise RanksFailed(self._failed) from error

    def _answers(self, timeout_s: float) -> list[Answer | None]:
        deadline = time.monotonic() + timeout_s
        found: list[Answer | None] = []
        for rank in self._lines.ranks:
            payload = self._lines.answer(rank, max(0.0, deadline - time.monotonic()))
            found.append(None if payload is None else cast("Answer", pickle.loads(payload)))
        return found

    def _fail(self, reason: str) -> None:
        self._failed = reason
        raise RanksFailed(reason)


def open_ranks(asked: int, *, key: str, device: Device, timeout_s: float) -> Alone | Leader:
    """Meet the other ranks as rank 0.

    Args:
        asked: number of processes in the configuration.
        key: where it says so, for the refusal.
        device: where to compute.
        timeout_s: bound of every wait between ranks.

    Raises:
        ValueError: another number of processes was started, or the device is not there.
        RanksFailed: the others did not come within the bound.
    """
    world = World.of()
    world.check(asked, key)
    here = device_of(device, world.local_rank)
    if world.size == 1:
        return Alone(here, timeout_s)
    try:
        groups = join(world, here, timeout_s=timeout_s)
        assert groups is not None
        host = "127.0.0.1" if world.one_machine else ""
        lines = LeaderLines(world.size - 1, host=host, timeout_s=timeout_s)
        address = Address(host or world.address, lines.port, lines.token)
        dist.broadcast_object_list([address], src=0, group=groups.control)
        lines.accept()
    except (RuntimeError, OSError) as error:
        text = " ".join(str(error).split())[:300]
        raise RanksFailed(f"the ranks did not meet within {timeout_s:g} s: {text}") from error
    mesh = groups.mesh
    return Leader(
        lines,
        GroupPath(groups.control),
        lambda spec: build(spec, here, mesh),
        timeout_s=timeout_s,
    )
