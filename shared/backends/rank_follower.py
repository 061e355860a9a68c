"""A rank that follows: performs what rank 0 says, until it says stop or is gone.

It has no bus and decides nothing. SIGTERM and SIGINT, which a launcher sends to every rank, are
rank 0's to answer; a leader that is gone, or silent for the bound, ends this process.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist

from shared.algo.batching import PackedBatch
from shared.backends.base import Backend
from shared.backends.building import BackendSpec, Device, build, device_of
from shared.backends.hf_files import Described
from shared.backends.rank_codec import ArrivingState, GroupPath, TensorPath, loads
from shared.backends.rank_commands import Answer, Command, Part, noted, share_of
from shared.backends.rank_ends import Address
from shared.backends.rank_lines import FollowerLine
from shared.backends.rank_scoring import part_of, scored_by
from shared.backends.rank_world import World, join
from shared.backends.ranks import BUILD


class Follower:
    """Performs commands on the backends of one rank."""

    def __init__(
        self, line: FollowerLine, path: TensorPath, build_here: Callable[[BackendSpec], Backend]
    ) -> None:
        self._line = line
        self._path = path
        self._build_here = build_here
        self._backends: dict[int, Backend] = {}

    def run(self) -> None:
        """Follow until told to stop.

        Raises:
            Exception: what makes this rank useless: not the refusals that rank 0 shares.
        """
        while (payload := self._line.command()) is not None:
            command = cast("Command", loads(payload, self._path.receive))
            try:
                answer = Answer(self._perform(command))
            except (ValueError, OSError) as error:
                answer = Answer(refusal=" ".join(str(error).split())[:300] or repr(error))
            except Exception as error:
                text = " ".join(str(error).split())[:300]
                if self._line.last_words(f"{command.method}: {type(error).__name__}: {text}"):
                    return
                raise
            self._line.answer(pickle.dumps(answer))

    def _perform(self, command: Command) -> Any:
        if command.method == BUILD:
            self._backends[command.backend] = self._build_here(*command.args)
            return None
        backend = self._backends[command.backend]
        match command.method:
            case "state":
                for _ in backend.stream():
                    pass
            case "load_state":
                self._load_state(backend, *command.args)
            case "accumulate":
                return _accumulate(backend, *command.args, **command.kwargs)
            case "score":
                return _score(backend, *command.args, **command.kwargs)
            case "load_hf" | "export_hf" | "step" | "snapshot" | "load":
                getattr(backend, command.method)(*command.args, **command.kwargs)
            case other:
                raise AssertionError(other)
        return None

    def _load_state(self, backend: Backend, described: Described) -> None:
        state = ArrivingState(described, self._path)
        try:
            backend.load_state(state)
        finally:
            state.drain()


def _score(backend: Backend, batch: PackedBatch, *, temperature: float) -> tuple[int, torch.Tensor]:
    mine = part_of(batch, scored_by(batch.lengths, backend.data_rank, backend.data_ranks))
    return backend.data_rank, backend.score(mine, temperature=temperature).cpu()


def _accumulate(backend: Backend, batches: Any, loss_fn: Any, **options: Any) -> Part:
    before = len(noted(loss_fn))
    mine = share_of(batches, backend.data_rank, backend.data_ranks)
    loss = backend.accumulate(mine, loss_fn, **options)
    return Part(backend.data_rank, loss, noted(loss_fn)[before:])


def follow(asked: int, *, key: str, device: Device, timeout_s: float, name: str) -> None:
    """Follow rank 0 to the end of the job.

    Args:
        asked: number of processes in the configuration.
        key: where it says so, for the refusal.
        device: where to compute.
        timeout_s: bound of every wait between ranks.
        name: of this process in its last line.

    Raises:
        ValueError: another number of processes was started, or the device is not there.
        RuntimeError, OSError: rank 0 was not met within the bound.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    world = World.of()
    world.check(asked, key)
    here = device_of(device, world.local_rank)
    groups = join(world, here, timeout_s=timeout_s)
    assert groups is not None
    given: list[Any] = [None]
    dist.broadcast_object_list(given, src=0, group=groups.control)
    mesh = groups.mesh

    def leave(reason: str) -> None:
        if reason:
            sys.stderr.write(f"lagwise {name} rank {world.rank}: {reason}: leaving\n")
            sys.stderr.flush()
        os._exit(1)

    line = FollowerLine(world.rank, cast("Address", given[0]), timeout_s=timeout_s, leave=leave)
    path = GroupPath(groups.control)
    Follower(line, path, lambda spec: build(spec, here, mesh)).run()
