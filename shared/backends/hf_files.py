"""Safetensors in a folder, one file or many with an index, read and written tensor by tensor.

The format of Hugging Face directories (stem `model`); checkpoints use it under stems of their own.

Nothing here holds more than one tensor (reading) or one file's worth (writing): models larger than
one host's memory stream through.
"""

from __future__ import annotations

import json
import os
import shutil
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

SHARD_BYTES = 4 << 30
"""Of one written file."""
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".index.json")

Described = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and dtype by name."""


class DescribedState(Mapping[str, torch.Tensor]):
    """A state that says what it holds without reading it."""

    @property
    @abstractmethod
    def described(self) -> Described: ...


def describe(state: Mapping[str, torch.Tensor]) -> Described:
    """Return shape and dtype by name."""
    if isinstance(state, DescribedState):
        return state.described
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()}


class HfFiles:
    """The tensors of a directory, read on demand."""

    def __init__(self, path: Path, stem: str = "model") -> None:
        """Read the names, not the values.

        Raises:
            ValueError: no safetensors, an index that names a missing file, an unreadable file.
        """
        self.path = path
        self._file_of: dict[str, str] = {}
        self._open: dict[str, Any] = {}
        single, index = f"{stem}.safetensors", f"{stem}.safetensors.index.json"
        if (path / index).is_file():
            try:
                weight_map = json.loads((path / index).read_text())["weight_map"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}: {index} is no index of tensors: {error!r}") from error
            self._file_of = cast("dict[str, str]", weight_map)
        elif (path / single).is_file():
            self._file_of = dict.fromkeys(self._handle(single).keys(), single)
        else:
            raise ValueError(f"{path}: neither {single} nor {index}")

    @property
    def names(self) -> frozenset[str]:
        """What the directory holds."""
        return frozenset(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading it."""
        handle = self._handle(self._file_of[name])
        return tuple(handle.get_slice(name).get_shape())

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor, in the dtype of the file.

        Raises:
            ValueError: the file is missing or does not hold it.
        """
        file = self._file_of[name]
        try:
            return self._handle(file).get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{self.path}: {file}: {name}: {error}") from error

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield all of them, in the order of the files."""
        for name in self._file_of:
            yield name, self.read(name)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all of them."""
        return {name: self.shape(name) for name in self._file_of}

    def check(self, shapes: Mapping[str, tuple[int, ...]], *, ignored: Iterable[str] = ()) -> None:
        """Compare with what a model wants.

        Raises:
            ValueError: missing, surplus or misshapen tensors; one line.
        """
        surplus = self.names - shapes.keys() - set(ignored)
        for kind, names in (("missing", shapes.keys() - self.names), ("unexpected", surplus)):
            if names:
                ordered = sorted(names)
                shown = ", ".join(ordered[:3]) + (", ..." if len(ordered) > 3 else "")
                raise ValueError(f"{self.path}: {kind} tensors: {shown}")
        for name, shape in shapes.items():
            if self.shape(name) != shape:
                raise ValueError(
                    f"{self.path}: {name} has shape {self.shape(name)}, its config says {shape}"
                )

    def _handle(self, file: str) -> Any:
        if file not in self._open:
            try:
                self._open[file] = safe_open(self.path / file, framework="pt")
            except (OSError, SafetensorError) as error:
                reason = " ".join(str(error).split())
                raise ValueError(f"{self.path}: {file}: {reason}") from error
        return self._open[file]


def write_hf(
    path: Path,
    source: Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    dtype: torch.dtype,
    writes: bool = True,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a Hugging Face directory: the tensors as they come, the source's other files.

    Complete or absent: written beside `path`, then renamed. Tokenizer, chat template and
    generation config are the source's files, byte for byte; of `config.json` only the dtype
    changes.

    Args:
        path: the new directory; one that exists is replaced.
        source: the directory that the model was loaded from.
        tensors: published names and values; consumed to the end on every rank.
        dtype: the values'.
        writes: False on ranks that only take part in gathering.
        shard_bytes: of one file, unless a single tensor is larger.
    """
    if not writes:
        for _ in tensors:
            pass
        return
    temporary = path.with_name(f".{path.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    write_tensors(temporary, tensors, shard_bytes=shard_bytes)
    for file in sorted(source.iterdir()):
        if file.is_file() and not file.name.endswith(WEIGHT_SUFFIXES):
            shutil.copyfile(file, temporary / file.name)
    config = json.loads((source / "config.json").read_text())
    key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
    config[key] = str(dtype).removeprefix("torch.")
    (temporary / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    if path.exists():
        shutil.rmtree(path)
    os.replace(temporary, path)


def write_tensors(
    folder: Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    stem: str = "model",
    shard_bytes: int = SHARD_BYTES,
    owned: bool = False,
) -> None:
    """Write tensors as they come into an existing folder and flush them to the disk.

    Args:
        folder: exists.
        tensors: names and values.
        stem: of the file names.
        shard_bytes: of one file, unless a single tensor is larger.
        owned: they are on the host, contiguous, share no memory and do not change meanwhile.

    Raises:
        OSError: the disk is full or not writable.
    """
    held: dict[str, torch.Tensor] = {}
    files: list[list[str]] = []
    size = total = 0

    def flush() -> None:
        nonlocal held, size
        part = folder / f".{stem}-{len(files):05d}.partial"
        try:
            part.touch()
            mode = part.stat().st_mode & 0o777  # as for every file; safetensors makes it private
            save_file(held, part, metadata={"format": "pt"})
            part.chmod(mode)
        except SafetensorError as error:  # hides which error of the disk it was
            raise OSError(f"{stem}.safetensors: {error}") from error
        with part.open("rb") as file:
            os.fsync(file.fileno())
        files.append(list(held))
        held, size = {}, 0

    for name, tensor in tensors:
        num_bytes = tensor.numel() * tensor.element_size()
        if held and size + num_bytes > shard_bytes:
            flush()
        # a copy: views of one tensor may not share memory in a file
        given = tensor.detach()
        held[name] = given if owned else given.cpu().clone(memory_format=torch.contiguous_format)
        size += num_bytes
        total += num_bytes
    flush()
    parts = [folder / f".{stem}-{number:05d}.partial" for number in range(len(files))]
    if len(files) == 1:
        os.replace(parts[0], folder / f"{stem}.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(files):
        file = f"{stem}-{number + 1:05d}-of-{len(files):05d}.safetensors"
        os.replace(parts[number], folder / file)
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    with (folder / f"{stem}.safetensors.index.json").open("w") as file:
        file.write(json.dumps(index, indent=2, sort_keys=True) + "\n")
        file.flush()
        os.fsync(file.fileno())


def check_given(state: Mapping[str, torch.Tensor], wanted: Described) -> None:
    """Compare a state that is to replace a model's with what the model holds.

    Args:
        state: by published name.
        wanted: shape and dtype, by published name.

    Raises:
        ValueError: names both sides of the first disagreement.
    """
    for name in wanted.keys() - state.keys():
        raise ValueError(f"load_state: the model has {name}, the given state does not")
    for name in state.keys() - wanted.keys():
        raise ValueError(f"load_state: the given state has {name}, the model does not")
    given = describe(state)
    for name, (shape, dtype) in wanted.items():
        if given[name] != (shape, dtype):
            raise ValueError(
                f"load_state: {name} is {given[name][1]} {given[name][0]} in the given "
                f"state, {dtype} {shape} in the model"
            )
