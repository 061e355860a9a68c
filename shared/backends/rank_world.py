"""The processes of one job as their launcher describes them, and the groups between them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


@dataclass(frozen=True)
class World:
    """This process among the others, as torchrun says it in the environment."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    address: str = "127.0.0.1"
    """Where rank 0 is."""

    @classmethod
    def of(cls, environ: Mapping[str, str] | None = None) -> World:
        """Read it; one process where nothing is said.

        Raises:
            ValueError: a variable is no number, or part of them is missing.
        """
        given = os.environ if environ is None else environ
        if "WORLD_SIZE" not in given:
            return cls()
        try:
            return cls(
                int(given["RANK"]),
                int(given["WORLD_SIZE"]),
                int(given["LOCAL_RANK"]),
                int(given.get("LOCAL_WORLD_SIZE", given["WORLD_SIZE"])),
                given["MASTER_ADDR"],
            )
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR: {error}: start the ranks by torchrun"
            ) from error

    @property
    def one_machine(self) -> bool:
        return self.local_size == self.size

    def check(self, asked: int, key: str) -> None:
        """Compare the number of processes with the configured one.

        Raises:
            ValueError: names both, and how to start.
        """
        if asked == self.size:
            return
        raise ValueError(
            f"{key} {asked}: {self.size} process{'es' * (self.size > 1)} started (WORLD_SIZE): "
            f"start {asked} with torchrun --nproc-per-node {asked} -m services.{key.split('.')[0]} "
            f"..., or set {key}={self.size}"
        )


@dataclass(frozen=True)
class Groups:
    """What the ranks compute and talk over."""

    control: Any
    """A gloo group of all ranks, for tensors that the leader hands out."""
    mesh: DeviceMesh
    """All ranks in one dimension."""


def join(world: World, device: torch.device, *, timeout_s: float) -> Groups | None:
    """Meet the other ranks; every later wait inside a collective has the same bound.

    Returns:
        None where this process is alone; it is then a group of one, which megatron-core wants.

    Raises:
        RuntimeError: they did not come within the bound.
    """
    timeout = timedelta(seconds=timeout_s)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if world.size == 1:
        if not dist.is_initialized():
            store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
            dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
        return None
    dist.init_process_group(
        backend,
        init_method="env://",
        rank=world.rank,
        world_size=world.size,
        timeout=timeout,
        device_id=device if device.type == "cuda" else None,
    )
    control = dist.new_group(backend="gloo", timeout=timeout)
    return Groups(control, init_device_mesh(device.type, (world.size,)))
