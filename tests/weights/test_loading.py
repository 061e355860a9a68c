from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.weights import keyframes
from shared.weights.bits import to_bits
from shared.weights.deltas import DeltaReader
from shared.weights.digests import sha256_of, specs, version_digest
from shared.weights.errors import Corrupt, WrongBase
from shared.weights.loading import Load
from shared.weights.replica import Replica
from shared.weights.spool import Spool
from tests.weights.chains import Shapes, State, bits_of, manifest_of, random_state

SHAPES: Shapes = {
    "a": ("F32", (40, 8)),
    "b": ("BF16", (7, 5)),
    "c": ("F8_E4M3", (33,)),
    "d": ("F64", (9,)),
    "e": ("I64", ()),
    "f": ("F32", (0, 3)),
}


def cut(data: bytes, size: int) -> Iterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


def holding(state: State) -> tuple[Replica, State]:
    """A replica of `state`, and its memory."""
    live = {name: tensor.clone() for name, tensor in state.items()}
    replica = Replica()
    replica.put(live, specs(state))
    return replica, live


OLD, NEW = random_state(1, SHAPES), random_state(2, SHAPES)
FILE = keyframes.encode(NEW)


@settings(deadline=None)
@given(size=st.integers(1, len(FILE) + 1), has_past=st.booleans())
def test_pieces_of_any_size_become_the_version(size: int, has_past: bool) -> None:
    replica, live = holding(OLD) if has_past else (Replica(), {})
    load = Load(replica, manifest_of(7, NEW, has_sha256=True))
    for piece in cut(FILE, size):
        load.feed(piece)
        assert replica.is_empty or len(live)
    assert not load.finish()
    assert bits_of(replica.state) == bits_of(NEW)
    assert replica.tensors == specs(NEW)
    if has_past:
        assert all(replica.state[n].data_ptr() == live[n].data_ptr() for n in live)


def test_nothing_is_held_while_the_copy_is_written() -> None:
    replica, _ = holding(OLD)
    load = Load(replica, manifest_of(7, NEW), Spool())
    load.feed(FILE[:8])
    assert not replica.is_empty
    load.feed(FILE[8:-1])
    assert replica.is_empty
    load.feed(FILE[-1:])
    assert replica.is_empty
    assert load.finish()
    assert not replica.is_empty


@settings(deadline=None)
@given(size=st.integers(1, len(FILE) + 1), changed=st.sampled_from(["all", "few", "none"]))
def test_what_is_captured_leads_back_and_forward_again(size: int, changed: str) -> None:
    old = {name: tensor.clone() for name, tensor in (OLD if changed == "all" else NEW).items()}
    if changed == "few":
        to_bits(old["a"])[[3, 77, 319]] += 1
        to_bits(old["e"])[0] -= 1
    replica, _ = holding(old)
    spool = Spool()
    load = Load(replica, manifest_of(7, NEW), spool)
    for piece in cut(FILE, size):
        load.feed(piece)
    assert load.finish()
    load.abort()  # over: nothing is taken back
    reader = DeltaReader(spool)
    assert (reader.base, reader.target) == (
        version_digest(specs(old)),
        version_digest(specs(NEW)),
    )
    assert reader.num_changed == sum(int((to_bits(old[n]) != to_bits(NEW[n])).sum()) for n in NEW)
    replica.apply(reader, reverse=True, expected=specs(old))
    assert bits_of(replica.state) == bits_of(old)
    replica.apply(reader, expected=specs(NEW))
    assert bits_of(replica.state) == bits_of(NEW)


@settings(deadline=None)
@given(size=st.integers(1, len(FILE) + 1), fed=st.integers(0, len(FILE)))
def test_an_abort_takes_back_every_bit(size: int, fed: int) -> None:
    replica, _ = holding(OLD)
    with closing(Spool(memory_bytes=100)) as spool:
        load = Load(replica, manifest_of(7, NEW), spool)
        for piece in cut(FILE[:fed], size):
            load.feed(piece)
        for _ in range(2):
            load.abort()
            assert bits_of(replica.state) == bits_of(OLD)
            assert replica.digest == version_digest(specs(OLD))


def test_an_abort_without_a_capture_leaves_nothing() -> None:
    replica, _ = holding(OLD)
    load = Load(replica, manifest_of(7, NEW))
    load.abort()
    assert replica.digest == version_digest(specs(OLD))  # nothing was written yet
    load.feed(FILE[:-1])
    load.abort()
    assert replica.is_empty


# --- keyframes that are not the version


def _flipped(data: bytes, index: int) -> bytes:
    changed = bytearray(data)
    changed[index] ^= 1
    return bytes(changed)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (_flipped(FILE, -1), "tensor 'e' of version 7"),
        (_flipped(FILE, -8 - 9 * 8 - 33 - 70 - 1), "tensor 'a' of version 7"),
        (FILE[:-1], "keyframe tensor e"),
        (FILE[:20], "keyframe"),
        (FILE + b"x", "keyframe"),
        (keyframes.encode(OLD), "tensor 'a' of version 7"),
    ],
)
@pytest.mark.parametrize("is_captured", [False, True])
def test_a_keyframe_that_is_not_the_version_is_refused_at_its_very_end(
    data: bytes, what: str, is_captured: bool
) -> None:
    replica, _ = holding(OLD)
    load = Load(replica, manifest_of(7, NEW), Spool() if is_captured else None)

    def read() -> None:
        for piece in cut(data, 50):
            load.feed(piece)
        load.finish()

    with pytest.raises(Corrupt, match=what):
        read()
    load.abort()
    if is_captured:
        assert bits_of(replica.state) == bits_of(OLD)
        assert replica.tensors == specs(OLD)
    elif len(data) > 100:
        assert replica.is_empty


def _without(name: str) -> State:
    return {n: t for n, t in NEW.items() if n != name}


@pytest.mark.parametrize(
    ("other", "name"),
    [
        (_without("f"), "f"),
        (NEW | {"z": torch.zeros(1)}, "z"),
        (NEW | {"a": NEW["a"].reshape(8, 40)}, "a"),
        (NEW | {"a": NEW["a"].view(torch.int32)}, "a"),
    ],
)
def test_a_keyframe_of_another_model_is_refused_before_anything_is_written(
    other: State, name: str
) -> None:
    replica, live = holding(OLD)
    before = bits_of(live)
    load = Load(replica, manifest_of(7, NEW), Spool())
    with pytest.raises(Corrupt, match=f"tensor '{name}' in the keyframe"):
        load.feed(keyframes.encode(other))
    assert bits_of(live) == before
    assert replica.digest == version_digest(specs(OLD))
    with pytest.raises(WrongBase, match=f"tensor '{name}'"):
        Load(replica, manifest_of(7, other))
    empty = Replica()
    with pytest.raises(Corrupt, match=f"tensor '{name}' in the keyframe"):
        Load(empty, manifest_of(7, NEW)).feed(keyframes.encode(other))
    assert empty.is_empty


def test_a_version_with_another_full_hash_is_taken_back() -> None:
    replica, _ = holding(OLD)
    manifest = manifest_of(7, NEW).model_copy(update={"sha256": sha256_of(OLD)})
    load = Load(replica, manifest, Spool())
    load.feed(FILE)
    with pytest.raises(Corrupt, match=f"{sha256_of(OLD)}.*{sha256_of(NEW)}"):
        load.finish()
    load.abort()
    assert bits_of(replica.state) == bits_of(OLD)


# --- a copy that was wrong before


def test_a_keyframe_heals_a_wrong_copy_and_says_that_there_is_no_way_back() -> None:
    replica, live = holding(OLD)
    to_bits(live["a"])[5] ^= 1
    load = Load(replica, manifest_of(7, NEW), Spool())
    load.feed(FILE)
    assert not load.finish()
    assert bits_of(replica.state) == bits_of(NEW)


def test_a_wrong_copy_does_not_come_back_by_an_abort() -> None:
    replica, live = holding(OLD)
    to_bits(live["a"])[5] ^= 1
    load = Load(replica, manifest_of(7, NEW), Spool())
    load.feed(FILE)
    load.abort()
    assert replica.is_empty


def test_digests_are_of_what_the_copy_holds_not_of_what_arrived() -> None:
    replica, _ = holding(OLD)
    load = Load(replica, manifest_of(7, NEW))
    load.feed(FILE[:-1])
    shadow = np.zeros(1, np.uint64)

    class Stuck(np.ndarray):  # type: ignore[type-arg]
        """Memory that does not take what is written to it."""

        def __setitem__(self, key: object, value: object) -> None:
            pass

    load._targets["e"] = shadow.view(Stuck)
    load.feed(FILE[-1:])
    with pytest.raises(Corrupt, match="tensor 'e' of version 7"):
        load.finish()


class FullSpool(Spool):
    """A disk that is full after so many writes."""

    def __init__(self, writes: int) -> None:
        super().__init__()
        self._writes = writes

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self._writes -= 1
        if self._writes < 0:
            super().write(bytes(data)[: len(data) // 2])
            raise OSError("No space left on device")
        super().write(data)


@pytest.mark.parametrize("writes", range(7))
def test_a_full_disk_leaves_the_version_before_or_nothing(writes: int) -> None:
    replica, _ = holding(OLD)
    load = Load(replica, manifest_of(7, NEW), FullSpool(writes))

    def read() -> None:
        load.feed(FILE)
        load.finish()

    with pytest.raises(OSError, match="No space"):
        read()
    load.abort()
    assert replica.is_empty or bits_of(replica.state) == bits_of(OLD)
