"""What every kind of keyframe store must notice when a file is not the one that was put."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import uuid
from types import SimpleNamespace

import fsspec
import pytest

from shared.weights import file_windows
from shared.weights.errors import ChunkGone, Corrupt
from shared.weights.keyframe_store import KeyframeStore

MB = 1024 * 1024


def new_id() -> str:
    return f"{uuid.uuid4().hex}-k"


def counted(num_bytes: int) -> bytes:
    return bytes(range(251)) * (num_bytes // 251) + bytes(num_bytes % 251)


def whole(store: KeyframeStore, artefact, piece_bytes: int = 64 * MB) -> bytes:
    return b"".join(bytes(piece) for piece in store.pieces(artefact, piece_bytes))


def test_a_file_that_vanished_is_gone(place) -> None:
    artefact = place.store.put(new_id(), [counted(5000)])
    place.store.delete(artefact.upload_id)
    with pytest.raises(ChunkGone, match=artefact.upload_id):
        whole(place.store, artefact)


@pytest.mark.parametrize("change", [-1, -4999, -5000, +1])
def test_a_file_of_another_length_is_refused_before_it_is_read(place, change: int) -> None:
    artefact = place.store.put(new_id(), [counted(5000)])
    place.fs.pipe_file(f"{place.root}/{artefact.location}", counted(5000 + change))
    with pytest.raises(Corrupt, match=f"5000 bytes, found {5000 + change} bytes"):
        whole(place.store, artefact)


def test_a_flipped_bit_is_noticed_at_the_end(place) -> None:
    data = bytearray(counted(5000))
    artefact = place.store.put(new_id(), [data])
    data[2500] ^= 1
    place.fs.pipe_file(f"{place.root}/{artefact.location}", bytes(data))
    with pytest.raises(Corrupt, match="xxh3"):
        whole(place.store, artefact)


@pytest.mark.parametrize("left", [0, MB // 2, 2 * MB])
def test_a_file_cut_short_between_two_pieces_ends_in_an_error(
    place, left: int, monkeypatch
) -> None:
    monkeypatch.setattr(file_windows, "RANGES_AT_ONCE", 1)
    artefact = place.store.put(new_id(), [counted(6 * MB)])
    pieces = place.store.pieces(artefact, piece_bytes=MB)
    assert bytes(next(pieces)) == counted(6 * MB)[:MB]
    path = f"{place.root}/{artefact.location}"
    if place.kind == "local":
        os.truncate(path, left)
    else:
        place.fs.pipe_file(path, counted(6 * MB)[:left])
    with pytest.raises((Corrupt, ChunkGone)):
        list(pieces)


def test_a_file_replaced_while_it_is_read_is_noticed(place) -> None:
    artefact = place.store.put(new_id(), [counted(6 * MB)])
    pieces = place.store.pieces(artefact, piece_bytes=MB)
    next(pieces)
    path = f"{place.root}/{artefact.location}"
    if place.kind == "local":
        with open(path, "r+b") as file:  # in place; a renamed one would leave the old one open
            file.seek(5 * MB)
            file.write(b"another")
    else:
        place.fs.pipe_file(path, bytes(6 * MB))
    with pytest.raises(Corrupt, match="xxh3"):
        list(pieces)


def test_a_local_file_deleted_while_it_is_read_is_read_to_its_end(local) -> None:
    artefact = local.put(new_id(), [counted(3 * MB)])
    pieces = local.pieces(artefact, piece_bytes=MB)
    first = bytes(next(pieces))
    local.delete(artefact.upload_id)
    assert first + b"".join(bytes(piece) for piece in pieces) == counted(3 * MB)


def _populates() -> bool:
    page = mmap.mmap(-1, mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    libc = ctypes.CDLL(None, use_errno=True)
    failed = libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(mmap.PAGESIZE), 22)
    return not failed or ctypes.get_errno() != errno.EINVAL


@pytest.mark.skipif(not _populates(), reason="needs MADV_POPULATE_READ (Linux 5.14)")
def test_a_file_cut_short_after_it_was_mapped_is_an_error_and_not_the_end_of_the_process(
    local, tmp_path, monkeypatch
) -> None:
    artefact = local.put(new_id(), [counted(MB)])

    def map_and_truncate(*args, **kw) -> mmap.mmap:
        window = mmap.mmap(*args, **kw)
        os.truncate(tmp_path / "run" / artefact.location, 10)
        return window

    broken = SimpleNamespace(
        mmap=map_and_truncate,
        ACCESS_READ=mmap.ACCESS_READ,
        ALLOCATIONGRANULARITY=mmap.ALLOCATIONGRANULARITY,
    )
    monkeypatch.setattr(file_windows, "mmap", broken)
    with pytest.raises(ChunkGone):
        whole(local, artefact)


@pytest.mark.parametrize("location", ["../../etc/passwd", "/etc/passwd", "model.safetensors", "x"])
def test_a_manifest_cannot_point_out_of_the_store(local, location: str) -> None:
    artefact = local.put(new_id(), [b"x"])
    for changes in ({"location": location}, {"location": location, "upload_id": ".."}):
        with pytest.raises(Corrupt, match="location"):
            whole(local, artefact.model_copy(update=changes))


def test_an_unknown_protocol_or_a_missing_package_is_refused_at_the_start(monkeypatch) -> None:
    with pytest.raises(ValueError, match="nowhere"):
        KeyframeStore("nowhere://bucket")

    def missing(*_: object, **__: object) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(ValueError, match="s3://bucket: Install s3fs"):
        KeyframeStore("s3://bucket")
