from __future__ import annotations

import struct
import tracemalloc

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.weights import blocks
from shared.weights.blocks import BLOCK, BLOCK_ELEMENTS, BlockWriter, spans, unpack
from shared.weights.errors import Corrupt
from shared.weights.kernels.base import FORMS
from shared.weights.kernels.reference import ReferenceKernels

_WRITER = BlockWriter(ReferenceKernels())


def _body(*streams: tuple[int, bytes]) -> memoryview:
    return memoryview(b"".join(struct.pack("<BI", kind, len(d)) + d for kind, d in streams))


def _unpack_dense(*streams: tuple[int, bytes], length: int = 1000):
    """Unpack the planes of a dense block of u2."""
    return unpack(_body(*streams), "dense", 2, length, length)


def _packings(record: bytes) -> list[int]:
    """Return how the streams of a record are packed."""
    found, at = [], BLOCK.size
    while at < len(record):
        packing, stored = struct.unpack_from("<BI", record, at)
        found.append(packing)
        at += 5 + stored
    return found


@given(st.integers(0, 5000), st.integers(0, 300))
def test_spans_cover_a_run_without_overlap(start: int, length: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK_ELEMENTS", 64)
        cut = list(spans(start, length))
    assert [i for s, n in cut for i in range(s, s + n)] == list(range(start, start + length))
    assert all(n == 64 for _, n in cut[:-1])
    assert all(0 < n <= 64 for _, n in cut)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 3000),
    st.sampled_from([1, 2, 4, 8]),
    st.sampled_from([0.002, 0.1, 1.0]),
)
def test_what_is_packed_is_unpacked(seed: int, length: int, width: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    old = rng.integers(0, 256, length * width, dtype=np.uint8).view(f"<u{width}")
    new = np.where(rng.random(length) < share, old + old.dtype.type(rng.integers(1, 200)), old)
    coded, record = ReferenceKernels().encode(old, new, 7), _WRITER.block(3, 7, old, new)
    if coded is None or record is None:
        assert coded is record is None
        return
    data, gain = record
    head = BLOCK.unpack_from(data)
    form = FORMS[head[4]]
    assert head[:4] == (3, 7, length, coded.count)
    assert (form, gain) == (coded.form, coded.digest_change)
    again = unpack(memoryview(data)[BLOCK.size :], form, width, coded.count, length)
    assert [s.tobytes() for s in again.streams] == [s.tobytes() for s in coded.streams]


def test_streams_that_do_not_shrink_are_stored_as_they_are() -> None:
    rng = np.random.default_rng(0)
    old = rng.integers(0, 2**32, 50_000, dtype=np.uint32)
    noise = rng.integers(0, 2**32, 50_000, dtype=np.uint32)
    record = _WRITER.block(0, 0, old, noise)
    assert record is not None
    assert _packings(record[0]) == [0, 0, 0, 0]
    low = _WRITER.block(0, 0, old, old + (noise >> 16))
    assert low is not None
    assert _packings(low[0])[:2] == [0, 0], "noise"
    assert _packings(low[0])[2] == 1, "one bit of eight"


def test_a_block_is_at_most_so_long_and_both_sides_are() -> None:
    bits = np.zeros(BLOCK_ELEMENTS + 1, np.uint8)
    with pytest.raises(ValueError, match="elements"):
        _WRITER.block(0, 0, bits, bits)
    with pytest.raises(ValueError, match="elements"):
        _WRITER.block(0, 0, bits[:5], bits[:4])


def test_frames_that_claim_more_than_their_block_can_hold_are_refused_unopened() -> None:
    bomb = zstandard.ZstdCompressor().compress(b"\0" * (256 << 20))
    assert len(bomb) < 64 << 10
    tracemalloc.start()
    with pytest.raises(Corrupt, match="a frame of 268435456"):
        _unpack_dense((1, bomb), (1, bomb))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


def test_frames_that_do_not_say_their_size_are_refused() -> None:
    compressor = zstandard.ZstdCompressor(write_content_size=False)
    with pytest.raises(Corrupt):
        _unpack_dense((1, compressor.compress(b"\0" * 1000)), (0, b"\0" * 1000))


def test_a_frame_that_holds_more_than_it_claims_is_refused() -> None:
    frame = zstandard.ZstdCompressor(write_checksum=False).compress(bytes(range(250)) * 4)
    claimed = zstandard.get_frame_parameters(frame).content_size
    assert claimed == 1000
    at = frame.index(struct.pack("<H", claimed - 256))
    lying = frame[:at] + struct.pack("<H", 999 - 256) + frame[at + 2 :]
    with pytest.raises(Corrupt, match="zstd"):
        _unpack_dense((1, lying), (0, b""))


@pytest.mark.parametrize("kind", ["flip", "cut", "extra", "two"])
def test_frames_are_refused_when_they_are_not_exactly_one_good_frame(kind: str) -> None:
    data = np.random.default_rng(0).integers(0, 9, 1000).astype(np.uint8).tobytes()
    frame = zstandard.ZstdCompressor(level=1, write_checksum=True).compress(data)
    good = _unpack_dense((1, frame), (0, b""))
    assert good.streams[0].tobytes() == data
    bad = {
        "flip": frame[:-9] + bytes([frame[-9] ^ 1]) + frame[-8:],
        "cut": frame[:-1],
        "extra": frame + b"\0",
        "two": frame + frame,
    }[kind]
    with pytest.raises(Corrupt):
        _unpack_dense((1, bad), (0, b""))


def test_bodies_with_too_little_too_much_or_another_packing_are_refused() -> None:
    plane = (0, b"\1" * 1000)
    _unpack_dense(plane, plane)
    for streams in ((plane,), (plane,) * 3, (plane, (2, b"")), (plane, (0, b"\1" * 1001))):
        with pytest.raises(Corrupt):
            _unpack_dense(*streams)
    body = _body(plane, plane)
    for size in range(0, len(body), 97):
        with pytest.raises(Corrupt):
            unpack(body[:size], "dense", 2, 1000, 1000)
