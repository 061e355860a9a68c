from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.weights import deltas
from shared.weights.bits import to_bits
from shared.weights.deltas import BytesSource, DeltaReader, DeltaWriter
from shared.weights.digests import sha256_of, specs, version_digest
from shared.weights.errors import Corrupt, WeightsError, WrongBase
from shared.weights.replica import Replica
from shared.wire.weights import TensorSpec
from tests.weights.chains import Shapes, State, bits_of, changed_and_unchanged, random_state

SHAPES: Shapes = {
    "a": ("F32", (40, 8)),
    "b": ("BF16", (7, 5)),
    "c": ("F16", (6,)),
    "d": ("F64", (9,)),
    "e": ("F8_E4M3", (33,)),
    "f": ("I64", ()),
    "g": ("F32", (0, 3)),
}


def stepped(state: State, seed: int, share: float = 0.1) -> State:
    """A copy in which some elements of every second tensor have other bits."""
    rng = np.random.default_rng(seed)
    new = {name: tensor.clone() for name, tensor in state.items()}
    for name in ("a", "b", "d", "f"):
        bits = to_bits(new[name])
        picked = rng.random(len(bits)) < share
        picked[rng.integers(len(bits))] = True
        bits[picked] += rng.integers(1, 200, picked.sum()).astype(bits.dtype)
    return new


def flip(state: State, name: str, index: int) -> None:
    to_bits(state[name])[index] ^= 1


class Rig:
    """A replica at version 0, the states of versions 0..3, and the deltas between them."""

    def __init__(self, threads: int = 1) -> None:
        self.states = [random_state(0, SHAPES)]
        for seed in range(1, 4):
            self.states.append(stepped(self.states[-1], seed))
        self.specs = [specs(state) for state in self.states]
        self.deltas = [
            deltas.encode(old, new)
            for old, new in zip(self.states[:-1], self.states[1:], strict=True)
        ]
        self.live = {name: tensor.clone() for name, tensor in self.states[0].items()}
        """The replica's own memory."""
        self.replica = Replica(threads=threads)
        self.replica.put(self.live, self.specs[0])

    def reader(self, index: int) -> DeltaReader:
        return DeltaReader(BytesSource(self.deltas[index]))

    def step(self, index: int, *, reverse: bool = False, sha256: str | None = None) -> None:
        expected = self.specs[index if reverse else index + 1]
        self.replica.apply(self.reader(index), reverse=reverse, expected=expected, sha256=sha256)

    def holds(self, version: int) -> bool:
        replica = self.replica
        return (
            not replica.is_empty
            and replica.digest == version_digest(self.specs[version])
            and replica.tensors == self.specs[version]
            and bits_of(replica.state) == bits_of(self.states[version])
        )

    def must_refuse(self, error: type[WeightsError], apply: Callable[[], object]) -> WeightsError:
        """Everything is as before, and the next good delta applies."""
        before = bits_of(self.live)
        with pytest.raises(error) as caught:
            apply()
        assert bits_of(self.live) == before
        assert self.holds(0)
        self.step(0)
        assert self.holds(1)
        return caught.value


@pytest.mark.parametrize("threads", [1, 3])
def test_a_copy_goes_along_deltas_and_back_in_its_own_memory(threads: int) -> None:
    rig = Rig(threads)
    places = {name: tensor.data_ptr() for name, tensor in rig.live.items()}
    assert rig.replica.apply(rig.reader(0), expected=rig.specs[1]) == {"a", "b", "d", "f"}
    assert rig.holds(1)
    rig.step(1)
    rig.step(2)
    assert rig.holds(3)
    for index in (2, 1, 0):
        rig.step(index, reverse=True)
        assert rig.holds(index)
    assert {name: t.data_ptr() for name, t in rig.replica.state.items()} == places


def test_an_empty_replica_holds_nothing_and_refuses_deltas() -> None:
    rig, replica = Rig(), Replica()
    assert (replica.is_empty, replica.digest, replica.tensors, len(replica.state)) == (
        True,
        "",
        (),
        0,
    )
    with pytest.raises(WrongBase):
        replica.apply(rig.reader(0), expected=rig.specs[1])


# --- deltas that must not be applied


def test_a_lost_delta_is_noticed_and_both_sides_are_named() -> None:
    rig = Rig()
    error = rig.must_refuse(
        WrongBase, lambda: rig.replica.apply(rig.reader(1), expected=rig.specs[2])
    )
    assert version_digest(rig.specs[0]) in str(error)
    assert version_digest(rig.specs[1]) in str(error)


def test_a_delta_in_the_wrong_direction_is_refused() -> None:
    rig = Rig()
    rig.must_refuse(
        WrongBase, lambda: rig.replica.apply(rig.reader(0), reverse=True, expected=rig.specs[0])
    )


def test_a_delta_to_another_version_is_refused_before_it_is_applied() -> None:
    rig = Rig()
    error = rig.must_refuse(
        Corrupt, lambda: rig.replica.apply(rig.reader(0), expected=rig.specs[2])
    )
    assert version_digest(rig.specs[1]) in str(error)
    assert version_digest(rig.specs[2]) in str(error)


def _renamed(state: State) -> State:
    return {("z" if name == "a" else name): tensor for name, tensor in state.items()}


def _reshaped(state: State) -> State:
    return {name: (t.reshape(8, 40) if name == "a" else t) for name, t in state.items()}


def _retyped(state: State) -> State:
    return {name: (t.view(torch.int32) if name == "a" else t) for name, t in state.items()}


@pytest.mark.parametrize("change", [_renamed, _reshaped, _retyped])
@pytest.mark.parametrize("is_forged", [False, True])
def test_a_delta_of_another_model_is_refused(
    change: Callable[[State], State], is_forged: bool
) -> None:
    """Also when its header claims our digests."""
    rig = Rig()
    theirs = deltas.encode(change(rig.states[0]), change(rig.states[1]))
    their_specs = specs(change(rig.states[0])), specs(change(rig.states[1]))
    expected = their_specs[1]
    if is_forged:
        for ours, other in zip(rig.specs, their_specs, strict=False):
            theirs = theirs.replace(version_digest(other).encode(), version_digest(ours).encode())
        expected = rig.specs[1]
    reader = DeltaReader(BytesSource(theirs))
    rig.must_refuse(WrongBase, lambda: rig.replica.apply(reader, expected=expected))


@pytest.mark.parametrize("lost", range(4))
def test_a_delta_that_lost_a_block_is_taken_back(lost: int) -> None:
    rig = Rig()
    pieces = list(DeltaWriter(rig.states[0], rig.states[1], tensors=rig.specs[0]).pieces())
    del pieces[1 + lost]
    reader = DeltaReader(BytesSource(b"".join(pieces)))
    rig.must_refuse(Corrupt, lambda: rig.replica.apply(reader, expected=rig.specs[1]))


def test_a_version_with_another_full_hash_is_taken_back() -> None:
    rig = Rig()
    error = rig.must_refuse(Corrupt, lambda: rig.step(0, sha256=sha256_of(rig.states[2])))
    assert sha256_of(rig.states[1]) in str(error)
    assert sha256_of(rig.states[2]) in str(error)
    rig.step(1, sha256=sha256_of(rig.states[2]))
    assert rig.holds(2)


# --- a copy that is wrong


@pytest.mark.parametrize("reverse", [False, True])
def test_a_flipped_bit_at_a_changed_element_is_noticed_by_the_next_delta(reverse: bool) -> None:
    rig = Rig()
    rig.step(0)
    index, _ = changed_and_unchanged(
        rig.states[0 if reverse else 1], rig.states[1 if reverse else 2]
    )
    flip(rig.live, "a", index)
    with pytest.raises(Corrupt, match="copy of tensor 'a'"):
        rig.step(0 if reverse else 1, reverse=reverse)
    assert rig.replica.is_empty
    assert not rig.replica.state


def test_a_flipped_bit_at_an_unchanged_element_is_noticed_by_the_full_hash() -> None:
    rig = Rig()
    _, index = changed_and_unchanged(rig.states[0], rig.states[1])
    flip(rig.live, "a", index)
    rig.step(0)  # digests follow the delta and say nothing about the element
    assert not rig.holds(1)
    with pytest.raises(Corrupt, match="copy of tensor 'a'"):
        rig.step(1, sha256=sha256_of(rig.states[2]))
    assert rig.replica.is_empty


# --- failures halfway


class FailingSource:
    """Fails at its n-th read of a block's body, and for `times` reads in all."""

    def __init__(self, data: bytes, at: int, error: BaseException, times: int = 1) -> None:
        self._inner, self.size = BytesSource(data), len(data)
        self.at, self._error, self._times, self.is_armed = at, error, times, False

    def read(self, offset: int, num_bytes: int) -> memoryview:
        if self.is_armed:
            self.at -= 1
            if self.at < 0 and self._times:
                self._times -= 1
                raise self._error
        return self._inner.read(offset, num_bytes)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("at", range(4))
@pytest.mark.parametrize("error", [OSError("disk"), MemoryError("full"), Corrupt("x", "y", "z")])
def test_a_failure_in_the_middle_of_a_write_is_taken_back(
    at: int, error: Exception, threads: int
) -> None:
    rig = Rig(threads)
    source = FailingSource(rig.deltas[0], at, error)
    reader = DeltaReader(source)
    source.is_armed = True
    with pytest.raises(type(error)):
        rig.replica.apply(reader, expected=rig.specs[1])
    assert rig.holds(0)
    rig.replica.apply(reader, expected=rig.specs[1])
    assert rig.holds(1)


def test_what_cannot_be_taken_back_is_not_held() -> None:
    rig = Rig()
    source = FailingSource(rig.deltas[0], 2, OSError("disk"), times=100)
    reader = DeltaReader(source)
    source.is_armed = True
    with pytest.raises(Corrupt, match="copy of tensor"):
        rig.replica.apply(reader, expected=rig.specs[1])
    assert rig.replica.is_empty


def test_an_interrupt_leaves_nothing_rather_than_something_doubtful() -> None:
    rig = Rig()
    source = FailingSource(rig.deltas[0], 2, KeyboardInterrupt())
    reader = DeltaReader(source)
    source.is_armed = True
    with pytest.raises(KeyboardInterrupt):
        rig.replica.apply(reader, expected=rig.specs[1])
    assert rig.replica.is_empty


@settings(deadline=None)
@given(
    seed=st.integers(0, 1 << 32),
    steps=st.lists(st.sampled_from(["next", "back", "bad"]), max_size=12),
    data=st.data(),
)
def test_whatever_delta_comes_the_copy_is_a_version_in_full(seed: int, steps, data) -> None:
    states = [random_state(seed, SHAPES)]
    readers: list[DeltaReader] = []
    replica, at = Replica(), 0
    replica.put({n: t.clone() for n, t in states[0].items()}, specs(states[0]))
    known: list[tuple[TensorSpec, ...]] = [specs(states[0])]
    for i, step in enumerate(steps):
        if step == "next":
            if at == len(readers):
                share = data.draw(st.sampled_from([0.01, 0.3, 1.0]))
                states.append(stepped(states[at], seed + i + 1, share))
                known.append(specs(states[-1]))
                readers.append(DeltaReader(BytesSource(deltas.encode(states[at], states[-1]))))
            replica.apply(readers[at], expected=known[at + 1])
            at += 1
        elif step == "back" and at:
            at -= 1
            replica.apply(readers[at], reverse=True, expected=known[at])
        elif step == "bad" and readers:
            index = data.draw(st.integers(0, len(readers) - 1))
            reverse = index == at  # the wrong way from where it could be applied
            with pytest.raises(WeightsError):
                replica.apply(
                    readers[index], reverse=reverse, expected=known[data.draw(st.integers(0, at))]
                )
        assert bits_of(replica.state) == bits_of(states[at])
        assert replica.tensors == known[at]
