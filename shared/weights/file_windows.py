"""A large file read from front to back through a small window: mapped, or by ranges."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from shared.weights.errors import Corrupt

WINDOW_BYTES = 64 * 1024 * 1024
"""Mapped at a time; what the consumer still holds of the window before it comes on top."""

RANGE_BYTES = 16 * 1024 * 1024
RANGES_AT_ONCE = 4
"""One connection to an object store is slow; so many ranges are under way or wait."""

_libc = ctypes.CDLL(None, use_errno=True)
_POPULATE = 22
"""MADV_POPULATE_READ, Linux 5.14."""


def mapped(path: Path, num_bytes: int, window_bytes: int = WINDOW_BYTES) -> Iterator[memoryview]:
    """Yield a local file window by window; a window is unmapped once nobody holds it.

    A file that is shorter or longer than expected when a window is opened is refused. One that is
    cut short *while* its window is read would kill the process (SIGBUS): files of the keyframe
    store are renamed into place and deleted, never written again.

    Raises:
        Corrupt: the file has not `num_bytes` bytes (any more).
        OSError: it is not there, or cannot be read.
    """
    step = max(1, window_bytes // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
    with path.open("rb") as file:
        for start in range(0, max(1, num_bytes), step):
            _check_size(path, num_bytes, os.fstat(file.fileno()).st_size)
            length = min(step, num_bytes - start)
            if length:
                window = mmap.mmap(file.fileno(), length, access=mmap.ACCESS_READ, offset=start)
                _populate(window)
                yield memoryview(window)
                # No close: it would fail while the consumer holds a view. It goes with the last.
                del window


def ranged(
    fs: Any, path: str, num_bytes: int, range_bytes: int = RANGE_BYTES
) -> Iterator[memoryview]:
    """Yield a file of an fsspec filesystem range by range, the next ones under way.

    Raises:
        Corrupt: the file has not `num_bytes` bytes (any more).
        OSError: it is not there, or cannot be read.
        Exception: whatever else the filesystem raises.
    """
    fs.invalidate_cache()  # object stores remember listings, and with them sizes
    _check_size(path, num_bytes, int(fs.info(path)["size"]))
    starts = iter(range(0, num_bytes, range_bytes))
    pool = ThreadPoolExecutor(RANGES_AT_ONCE, thread_name_prefix="keyframe")
    under_way: deque[tuple[int, Future[bytes]]] = deque()

    def begin() -> None:
        start = next(starts, None)
        if start is not None:
            end = min(start + range_bytes, num_bytes)
            future = pool.submit(fs.cat_file, path, start=start, end=end)
            under_way.append((end - start, future))

    try:
        for _ in range(RANGES_AT_ONCE):
            begin()
        while under_way:
            (expected, future) = under_way.popleft()
            data = future.result()
            del future
            if len(data) != expected:
                raise Corrupt(path, f"a range of {expected} bytes", f"{len(data)} bytes")
            begin()
            yield memoryview(data)
            del data
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _check_size(path: object, expected: int, found: int) -> None:
    if found != expected:
        raise Corrupt(str(path), f"a file of {expected} bytes", f"{found} bytes")


def _populate(window: mmap.mmap) -> None:
    """Read the window in now, where an input error is an `OSError` and not yet a SIGBUS.

    Raises:
        OSError: a page of it cannot be read: the file was cut short, its server forgot it.
    """
    if sys.platform != "linux":
        return
    bits = np.frombuffer(window, np.uint8)
    # Through ctypes, for `mmap.madvise` would keep the interpreter's lock while it reads.
    if _libc.madvise(ctypes.c_void_p(bits.ctypes.data), ctypes.c_size_t(len(bits)), _POPULATE):
        number = ctypes.get_errno()
        if number != errno.EINVAL:  # an older kernel
            raise OSError(number, os.strerror(number))
