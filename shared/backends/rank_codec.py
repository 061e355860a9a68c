"""Commands between ranks: small things pickled, large tensors beside the pickle.

The ranks are processes of one job that trust one another; nothing of this is on the wire between
services.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist

from shared.backends.hf_files import Described, DescribedState

APART_BYTES = 4096
"""A tensor from this size on travels as a tensor."""
READ_AGAIN = 4
"""A model may put one tensor into several places, one after the other."""


class TensorPath(Protocol):
    """How a tensor gets from the leader to every follower."""

    def send(self, tensor: torch.Tensor) -> None: ...

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return it on the CPU; sender and receivers agree on the order."""
        ...


class GroupPath:
    """Broadcasts over a gloo group, each bounded by the group's timeout."""

    def __init__(self, group: Any) -> None:
        self._group = group

    def send(self, tensor: torch.Tensor) -> None:
        dist.broadcast(_bytes_of(tensor.detach().cpu().contiguous()), src=0, group=self._group)

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        tensor = torch.empty(shape, dtype=dtype)
        dist.broadcast(_bytes_of(tensor), src=0, group=self._group)
        return tensor


def dumps(content: object) -> tuple[bytes, list[torch.Tensor]]:
    """Return the pickle, and the tensors that are to be sent after it, in order."""
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(content)
    return file.getvalue(), pickler.apart


def loads(payload: bytes, receive: Callable[[tuple[int, ...], torch.dtype], torch.Tensor]) -> Any:
    """Return the content; its tensors are received while it is read."""
    return _Unpickler(io.BytesIO(payload), receive).load()


class ArrivingState(DescribedState):
    """A state whose tensors arrive one at a time, in the order they are described in.

    Reading them in that order holds a few at a time: a tensor is let go once it has been read and
    `READ_AGAIN` later ones have arrived. One that nobody has read yet is kept.
    """

    def __init__(self, described: Described, path: TensorPath) -> None:
        self._described = dict(described)
        self._path = path
        self._coming = iter(self._described.items())
        self._kept: dict[str, torch.Tensor] = {}
        self._read: dict[str, int] = {}
        """How many have arrived since a kept tensor was read last."""

    @property
    def described(self) -> Described:
        return self._described

    def __getitem__(self, name: str) -> torch.Tensor:
        """Return a tensor, receiving up to it.

        Raises:
            KeyError: there is none of that name, or it was let go.
        """
        while name not in self._kept:
            following, (shape, dtype) = next(self._coming, ("", ((), torch.float32)))
            if not following:
                raise KeyError(name)
            self._kept[following] = self._path.receive(shape, dtype)
            self._let_go()
        self._read[name] = 0
        return self._kept[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._described)

    def __len__(self) -> int:
        return len(self._described)

    def drain(self) -> None:
        """Receive what nobody read: the leader sends all of it."""
        self._kept.clear()
        for _, (shape, dtype) in self._coming:
            self._path.receive(shape, dtype)

    def _let_go(self) -> None:
        for name in list(self._read):
            self._read[name] += 1
            if self._read[name] > READ_AGAIN:
                del self._read[name], self._kept[name]


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.apart: list[torch.Tensor] = []
        self._numbers: dict[int, int] = {}

    def persistent_id(self, obj: object) -> object:
        if not isinstance(obj, torch.Tensor):
            return None
        if obj.numel() * obj.element_size() < APART_BYTES:
            return None
        number = self._numbers.setdefault(id(obj), len(self.apart))
        if number == len(self.apart):
            self.apart.append(obj)
        return number, tuple(obj.shape), obj.dtype


class _Unpickler(pickle.Unpickler):
    def __init__(
        self,
        file: io.BytesIO,
        receive: Callable[[tuple[int, ...], torch.dtype], torch.Tensor],
    ) -> None:
        super().__init__(file)
        self._receive = receive
        self._received: dict[int, torch.Tensor] = {}

    def persistent_load(self, pid: Any) -> torch.Tensor:
        number, shape, dtype = cast("tuple[int, tuple[int, ...], torch.dtype]", pid)
        if number not in self._received:
            self._received[number] = self._receive(shape, dtype)
        return self._received[number]


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """View a contiguous tensor as bytes: every dtype travels alike."""
    return tensor.reshape(-1).view(torch.uint8)
