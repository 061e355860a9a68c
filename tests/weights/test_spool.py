from __future__ import annotations

import os
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as some

from shared.weights.spool import Spool

MB = 1024 * 1024


@given(
    pieces=some.lists(some.binary(max_size=60), max_size=12),
    limit=some.integers(0, 200),
    spans=some.lists(some.tuples(some.integers(0, 400), some.integers(0, 400)), max_size=10),
)
def test_what_is_read_is_what_was_written_wherever_it_lies(pieces, limit, spans) -> None:
    spool = Spool(limit)
    whole = b"".join(pieces)
    try:
        for piece in pieces:
            spool.write(piece)
        assert spool.size == len(whole)
        assert spool.bytes_in_memory == min(limit, len(whole))
        assert spool.bytes_spilled == max(0, len(whole) - limit)
        for offset, count in spans:
            if offset + count <= len(whole):
                assert spool.read(offset, count) == whole[offset : offset + count]
            else:
                with pytest.raises(ValueError, match="of a spool of"):
                    spool.read(offset, count)
    finally:
        spool.close()


def test_pieces_of_every_size_are_joined_where_a_read_crosses_them() -> None:
    spool = Spool(4 * MB)
    sizes = [1, MB, 3, 2 * MB, 5, 7, MB - 1, 2 * MB, 11]
    whole = b"".join(bytes([65 + i]) * size for i, size in enumerate(sizes))
    start = 0
    for size in sizes:
        spool.write(memoryview(whole)[start : start + size])
        start += size
    for offset in range(0, len(whole) - 3, MB // 3):
        assert (
            spool.read(offset, MB + 1 if offset + MB < len(whole) else 3)[:3]
            == (whole[offset : offset + 3])
        )
    assert spool.read(0, len(whole)) == whole
    spool.close()


def test_the_writers_buffer_may_be_used_again() -> None:
    for limit in (0, 4, 1000):
        spool = Spool(limit)
        buffer = bytearray(b"first...")
        spool.write(buffer)
        buffer[:] = b"secondly"
        assert spool.read(0, 8) == b"first..."
        spool.close()


def test_a_piece_already_handed_out_survives_further_writes_and_the_end() -> None:
    spool = Spool(1000)
    spool.write(b"abc")
    seen = spool.read(0, 3)
    spool.write(b"x" * 2000)
    spool.close()
    assert seen == b"abc"
    with pytest.raises(ValueError, match="closed"):
        spool.read(0, 1)
    with pytest.raises(ValueError, match="closed"):
        spool.write(b"")


def test_beyond_its_limit_a_spool_takes_disk_and_no_memory() -> None:
    piece = os.urandom(MB)
    tracemalloc.start()
    spool = Spool(4 * MB)
    for _ in range(64):
        spool.write(piece)
    (now, peak) = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (spool.bytes_in_memory, spool.bytes_spilled) == (4 * MB, 60 * MB)
    assert peak < 6 * MB
    assert now < 6 * MB
    spool.close()


def test_several_threads_read_at_once() -> None:
    spool = Spool(MB)
    whole = os.urandom(3 * MB)
    spool.write(whole)
    starts = range(0, 3 * MB - 5000, 5000)
    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(lambda start: bytes(spool.read(start, 5000)), starts))
    assert parts == [whole[start : start + 5000] for start in starts]
    spool.close()
