from __future__ import annotations

import itertools
import json
import struct

import numpy as np
import pytest
import safetensors.torch as st
import torch
from hypothesis import given
from hypothesis import strategies as some
from safetensors import safe_open

from shared.weights import keyframes
from shared.weights.bits import bits_dtype, dtype_of, from_bits, same_bits, to_bits
from shared.weights.errors import Corrupt
from shared.weights.keyframes import SafetensorsFeed, SafetensorsPieces

DTYPES = ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I64", "I32", "I16", "I8", "U8"]


@some.composite
def states(draw) -> dict[str, torch.Tensor]:
    """Odd names, every dtype, scalars, empty ones; any bits."""
    state = {}
    names = draw(some.lists(some.text(max_size=6), max_size=6, unique=True))
    for name in names:
        if name == "__metadata__":
            continue
        dtype = dtype_of(draw(some.sampled_from(DTYPES)))
        shape = tuple(draw(some.lists(some.integers(0, 4), max_size=3)))
        count = int(np.prod(shape, dtype=int)) * dtype.itemsize
        raw = draw(some.binary(min_size=count, max_size=count))
        bits = np.frombuffer(bytearray(raw), bits_dtype(dtype.itemsize))
        state[name] = from_bits(bits, keyframes.code_of(dtype), shape)
    return state


def read(data: bytes, cuts: list[int]) -> dict[str, torch.Tensor]:
    """The state as it is put together from the runs of a file fed in pieces."""
    feed = SafetensorsFeed(len(data))
    found: dict[str, np.ndarray] = {}
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    for start, stop in itertools.pairwise(edges):
        for run in feed.feed(data[start:stop]):
            part = found.setdefault(run.name, np.empty(0, run.bits.dtype))
            assert run.start == len(part)
            assert run.bits.flags.aligned
            found[run.name] = np.concatenate([part, run.bits])
    feed.close()
    state = {}
    for name, code, shape in feed.tensors:
        empty = np.empty(0, bits_dtype(dtype_of(code).itemsize))
        state[name] = from_bits(found.get(name, empty), code, shape)
    return state


def read_whole(data: bytes) -> None:
    feed = SafetensorsFeed()
    feed.feed(data)
    feed.close()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(same_bits(a[name], b[name]) for name in a)


@given(state=states(), piece_bytes=some.integers(1, 64))
def test_the_safetensors_library_reads_what_is_written(state, piece_bytes) -> None:
    pieces = SafetensorsPieces(state, piece_bytes)
    data = b"".join(pieces)
    assert len(data) == pieces.num_bytes
    assert same(st.load(data), state)
    assert b"".join(SafetensorsPieces(dict(reversed(state.items())))) == data


@given(state=states(), cuts=some.lists(some.integers(0, 2000), max_size=8))
def test_what_the_safetensors_library_writes_is_read_from_any_pieces(state, cuts) -> None:
    assert same(read(st.save(state), cuts), state)
    assert same(read(keyframes.encode(state), cuts), state)


@given(state=states(), data=some.data())
def test_a_file_cut_short_continued_or_changed_is_refused_or_read_but_never_a_crash(
    state, data
) -> None:
    good = keyframes.encode(state)
    short = good[: data.draw(some.integers(0, len(good) - 1))]
    for bad in (short, good + b"\0"):
        with pytest.raises(Corrupt):
            read_whole(bad)
    flipped = bytearray(good)
    flipped[data.draw(some.integers(0, len(good) - 1))] ^= 1 << data.draw(some.integers(0, 7))
    feed = SafetensorsFeed(len(good))
    try:
        feed.feed(flipped)
        feed.close()
    except Corrupt:
        pass
    else:
        # Only the digest of the whole can tell: the file is well-formed.
        assert feed.tensors is not None


def test_pieces_are_bounded_and_the_size_is_known_before_they_are_made() -> None:
    pieces = SafetensorsPieces({"a": torch.zeros(1000), "b": torch.zeros(3)}, 512)
    sizes = [len(piece) for piece in pieces]
    assert max(sizes) == 512
    assert sum(sizes) == pieces.num_bytes


def test_tied_strided_scalar_and_empty_tensors_are_written_each_for_itself(tmp_path) -> None:
    tied = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    state = {
        "embed": tied,
        "head": tied,
        "view": tied.t(),
        "flag": torch.tensor([True, False, True]),  # shifts what follows to odd addresses
        "scalar": torch.tensor(-0.0),
        "zero": torch.zeros(0, 7),
        "grad": torch.nn.Parameter(torch.ones(2)),
    }
    path = tmp_path / "model.safetensors"
    path.write_bytes(keyframes.encode(state))
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert same({name: file.get_tensor(name) for name in file.keys()}, state)  # noqa: SIM118
    assert same(read(path.read_bytes(), [9, 10, 11, 200, 201]), state)


def test_an_element_that_arrives_byte_by_byte_is_handed_out_once_and_whole() -> None:
    state = {"a": torch.arange(3, dtype=torch.int64), "b": torch.ones(2, dtype=torch.int8)}
    data = keyframes.encode(state)
    assert same(read(data, list(range(len(data)))), state)


def file_of(head: object, body: bytes = b"", length: int | None = None) -> bytes:
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def tensor(dtype: object = "U8", shape: object = (1,), offsets: object = (0, 1)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (file_of({}, length=1 << 40), "header of"),
        (file_of({}, length=1), "header of"),
        (file_of(b"\xff\xff"), "JSON"),
        (file_of(b"[" * 200_000), "JSON"),
        (file_of(b"9" * 5000), "JSON"),
        (file_of([1, 2]), "JSON object"),
        (file_of(b'{"a":1,"a":2}'), "twice"),
        (file_of({"a": 1}), "data_offsets"),
        (file_of({"a": tensor() | {"more": 1}}), "data_offsets"),
        (file_of({"a": tensor("Q9")}), "published dtype"),
        (file_of({"a": tensor(["U8"])}), "published dtype"),
        (file_of({"a": tensor("U8", [-1])}), "shape"),
        (file_of({"a": tensor("U8", [True])}), "shape"),
        (file_of({"a": tensor("U8", [1.0])}), "shape"),
        (file_of({"a": tensor("U8", "1")}), "shape"),
        (file_of({"a": tensor("U8", [1] * 100)}), "shape"),
        (file_of({"a": tensor("U8", [1], [0])}), "two offsets"),
        (file_of({"a": tensor("U8", [1], [1, 0])}), "bytes"),
        (file_of({"a": tensor("F32", [1 << 62, 4], [0, 4])}), "bytes"),
        (file_of({"a": tensor(offsets=[1, 2])}), "from 0 on"),
        (file_of({"a": tensor(), "b": tensor()}), "from 1 on"),
        (file_of({"a": tensor(), "b": tensor(offsets=[2, 3])}), "from 1 on"),
        (file_of({"a": tensor()}), "1 bytes, found 0"),
        (file_of({"a": tensor()}, b"12"), "end of the file"),
    ],
)
def test_a_header_that_lies_is_refused_with_a_reason(data: bytes, words: str) -> None:
    with pytest.raises(Corrupt, match=words):
        read_whole(data)


def test_a_header_for_another_size_is_refused_before_any_tensor_is_read() -> None:
    feed = SafetensorsFeed(num_bytes=1000)
    with pytest.raises(Corrupt, match="1000 bytes"):
        feed.feed(file_of({"a": tensor("F64", [1 << 50], [0, 1 << 53])}))
    assert feed.tensors is None


def test_what_cannot_be_published_is_refused_before_anything_is_written() -> None:
    with pytest.raises(ValueError, match="dtype"):
        SafetensorsPieces({"a": torch.zeros(1, dtype=torch.complex64)})
    with pytest.raises(ValueError, match="__metadata__"):
        SafetensorsPieces({"__metadata__": torch.zeros(1)})


def test_bits_survive_the_way_there_and_back() -> None:
    nan = torch.tensor([0x7FC1, 0xFFFF, 0x8000], dtype=torch.uint16).view(torch.bfloat16)
    (run,) = SafetensorsFeed().feed(keyframes.encode({"nan": nan}))
    assert run.bits.tolist() == to_bits(nan).tolist()
    assert same_bits(keyframes.decode(keyframes.encode({"nan": nan}))["nan"], nan)
