"""A file that is there whole or not at all: in a folder, or wherever fsspec reaches."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fsspec.spec import AbstractBufferedFile

from shared.runtime.disk import sync
from shared.weights.cutting import Piece
from shared.weights.errors import WeightsError

Write = Callable[[Piece], object]

PART_BYTES = 32 * 1024 * 1024
"""Sent to an object store at a time, and held twice until it is."""
_MAX_PARTS = 5000
"""Object stores allow 10,000 parts of one object."""


@contextmanager
def local_file(folder: Path, name: str) -> Generator[Write]:
    """Write `folder/name`; after an error inside the block the folder is gone.

    Raises:
        OSError: no room, no permission.
    """
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{name}.part"
    try:
        with temporary.open("wb") as file:
            yield file.write
            file.flush()
            # A record must never name a file that a power loss can still take.
            os.fsync(file.fileno())
        temporary.replace(folder / name)
        sync(folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


@contextmanager
def remote_file(fs: Any, folder: str, name: str, size: int) -> Generator[Write]:
    """Write `folder/name` on an fsspec filesystem, which shows an object once it is complete.

    After an error inside the block the folder is gone. `size` is what is expected, 0 if unknown.

    Raises:
        OSError: the filesystem refuses, whatever it raises itself.
    """
    part_bytes = max(PART_BYTES, -(-size // _MAX_PARTS))
    with os_errors(folder):
        fs.makedirs(folder, exist_ok=True)
        file = fs.open(f"{folder}/{name}", "wb", block_size=part_bytes, autocommit=False)

    def write(piece: Piece) -> None:
        with os_errors(folder):
            file.write(piece)

    try:
        yield write
        with os_errors(folder):
            file.close()
            file.commit()
    except BaseException:
        with suppress(Exception):
            file.discard()
        if isinstance(file, AbstractBufferedFile):
            file.closed = True  # or its finalizer would try to complete the upload
        with suppress(Exception):
            fs.rm(folder, recursive=True)
        raise


@contextmanager
def os_errors(what: str) -> Generator[None]:
    """Raise as `OSError` what the libraries behind fsspec raise as something of their own."""
    try:
        yield
    except (OSError, WeightsError):
        raise
    except Exception as error:
        raise OSError(f"{what}: {error!r}") from error
