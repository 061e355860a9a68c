"""What every kind of keyframe store promises to a writer and to a sweep."""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections.abc import Iterator

import pytest
import safetensors.torch as st
import torch

from shared.weights.keyframe_store import KeyframeStore, put_keyframe
from shared.weights.keyframes import SafetensorsPieces

MB = 1024 * 1024


def new_id() -> str:
    return f"{uuid.uuid4().hex}-k"


def counted(num_bytes: int) -> bytes:
    return bytes(range(251)) * (num_bytes // 251) + bytes(num_bytes % 251)


def whole(store: KeyframeStore, artefact, piece_bytes: int = 64 * MB) -> bytes:
    return b"".join(bytes(piece) for piece in store.pieces(artefact, piece_bytes))


@pytest.mark.parametrize("size", [1, 5000, 3 * MB + 7])
def test_what_is_put_comes_back_in_bounded_pieces(place, size: int) -> None:
    data = counted(size)
    artefact = place.store.put(new_id(), [data[: size // 3], memoryview(data)[size // 3 :]])
    assert (artefact.kind, artefact.num_chunks, artefact.num_bytes) == ("keyframe", 0, size)
    assert artefact.location == f"{artefact.upload_id}/model.safetensors"
    pieces = [bytes(piece) for piece in place.store.pieces(artefact, piece_bytes=MB)]
    assert max(map(len, pieces)) <= MB
    assert b"".join(pieces) == data


def test_the_file_is_one_that_the_safetensors_library_reads(local, tmp_path) -> None:
    state = {"b": torch.arange(10.0), "a": torch.ones(3, dtype=torch.bfloat16)}
    artefact = local.put(new_id(), SafetensorsPieces(state))
    loaded = st.load_file(tmp_path / "run" / artefact.location)
    assert all(torch.equal(loaded[name], state[name]) for name in state)


def test_an_object_of_several_parts_is_put_together(place) -> None:
    piece = counted(4 * MB)
    artefact = place.store.put(new_id(), (piece for _ in range(9)))
    assert artefact.num_bytes == 36 * MB
    assert whole(place.store, artefact) == piece * 9


def test_uploads_are_listed_with_their_age_and_can_be_deleted(place) -> None:
    assert place.store.list() == {}
    before = time.time()
    kept, gone = (place.store.put(new_id(), [b"x" * 100]) for _ in range(2))
    listed = place.store.list()
    assert set(listed) == {kept.upload_id, gone.upload_id}
    assert all(before - 2 <= moment <= time.time() + 2 for moment in listed.values())
    place.store.delete(gone.upload_id)
    place.store.delete(gone.upload_id)
    assert set(place.store.list()) == {kept.upload_id}
    assert whole(place.store, kept) == b"x" * 100


def test_what_others_keep_below_the_same_folder_is_neither_listed_nor_deleted(place) -> None:
    for name in ("qwen3/model.safetensors", "run-7/notes.txt", f"{'A' * 32}/model.safetensors"):
        place.fs.makedirs(f"{place.root}/{name.partition('/')[0]}", exist_ok=True)
        place.fs.pipe_file(f"{place.root}/{name}", b"theirs")
    place.fs.pipe_file(f"{place.root}/{uuid.uuid4().hex}", b"a file, no folder")
    mine = place.store.put(new_id(), [b"x"])
    assert set(place.store.list()) == {mine.upload_id}
    for name in ("qwen3", "..", "", "a/b", "*"):
        with pytest.raises(ValueError, match="upload id"):
            place.store.delete(name)
        with pytest.raises(ValueError, match="upload id"):
            place.store.put(name, [b"x"])
    assert place.fs.cat_file(f"{place.root}/qwen3/model.safetensors") == b"theirs"


@pytest.mark.parametrize("sizes", [[], [100], [5 * MB] * 8])
def test_an_upload_that_fails_leaves_nothing_and_raises_its_own_error(place, sizes) -> None:
    def pieces() -> Iterator[bytes]:
        yield from map(counted, sizes)
        raise LookupError("the model is gone")

    with pytest.raises(LookupError, match="the model is gone"):
        place.store.put(new_id(), pieces())
    assert place.store.list() == {}
    assert place.fs.find(place.root) == []
    if place.kind == "s3":
        bucket = place.root.partition("/")[0]
        assert place.fs.call_s3("list_multipart_uploads", Bucket=bucket).get("Uploads", []) == []


def test_a_local_file_has_its_name_only_once_it_is_complete(local, tmp_path) -> None:
    upload_id = new_id()
    folder = tmp_path / "run" / upload_id

    def pieces() -> Iterator[bytes]:
        for _ in range(3):
            assert not (folder / "model.safetensors").exists()
            assert upload_id in local.list() or not any(folder.iterdir())
            yield b"x" * 1000

    local.put(upload_id, pieces())
    assert [path.name for path in folder.iterdir()] == ["model.safetensors"]


def test_a_store_that_cannot_be_written_says_so(tmp_path) -> None:
    (tmp_path / "file").write_bytes(b"")
    store = KeyframeStore(str(tmp_path / "file"))
    with pytest.raises(OSError, match="file"):
        store.put(new_id(), [b"x"])
    assert store.list() == {}


def test_a_server_that_does_not_answer_is_an_os_error_whatever_its_library_raises() -> None:
    pytest.importorskip("s3fs", reason="the s3 extra is not installed")
    options = {
        "endpoint_url": "http://127.0.0.1:9",
        "key": "key",
        "secret": "secret",
        "config_kwargs": {"retries": {"max_attempts": 0}, "connect_timeout": 1},
    }
    store = KeyframeStore("s3://weights/run", options)
    store._fs.retries = 1
    with pytest.raises(OSError, match=r"127\.0\.0\.1"):
        store.list()
    with pytest.raises(OSError, match=r"127\.0\.0\.1"):
        store.put(new_id(), [b"x"])


async def test_a_cancelled_upload_ends_at_the_next_piece_and_leaves_nothing(local) -> None:
    reading = threading.Event()
    running = False

    def pieces() -> Iterator[bytes]:
        nonlocal running
        for _ in range(1000):
            running = True
            reading.set()
            time.sleep(0.02)
            running = False
            yield b"x" * 100

    putting = asyncio.ensure_future(put_keyframe(local, new_id(), pieces()))
    await asyncio.to_thread(reading.wait)
    putting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await putting
    assert not running
    assert local.list() == {}


async def test_an_upload_that_is_not_cancelled_returns_its_artefact_or_its_error(local) -> None:
    artefact = await put_keyframe(local, new_id(), [b"x" * 10])
    assert whole(local, artefact) == b"x" * 10
    with pytest.raises(ValueError, match="upload id"):
        await put_keyframe(local, "no id", [b"x"])
