from __future__ import annotations

import pytest

from shared.weights import deltas
from shared.weights.blocks import TRAILER
from shared.weights.digests import sha256_of
from shared.weights.errors import Corrupt, MissingVersion, WeightsError, WrongBase
from shared.weights.spool import Spool
from shared.wire.weights import Manifest
from tests.weights.chains import (
    SHAPES,
    Chain,
    bits_of,
    changed_and_unchanged,
    flip,
)

# --- what must be refused: everything stays as it was, and the next good delta applies


BAD_DELTAS: list[tuple[str, type[WeightsError]]] = [
    ("lost", WrongBase),
    ("wrong order", WrongBase),
    ("another model", WrongBase),
    ("another version", Corrupt),
    ("no delta", Corrupt),
    ("truncated", Corrupt),
    ("lost block", Corrupt),
    ("flipped", Corrupt),
    ("wrong sha256", Corrupt),
    ("contradiction", Corrupt),
    ("unknown base", MissingVersion),
]


def _bad_delta(chain: Chain, kind: str) -> tuple[Manifest, int, bytes]:
    """Version 3 over versions 0..2."""
    good, manifest = chain.deltas[3], chain.manifests[3]
    if kind == "lost":
        return chain.manifests[4], 2, chain.deltas[4]
    if kind == "wrong order":
        return manifest, 2, chain.deltas[2]
    if kind == "another model":
        other = Chain(4, shapes=SHAPES | {"a": ("F32", (8, 20))})
        return other.manifests[3], 2, other.deltas[3]
    if kind == "another version":
        return chain.manifests[4], 2, good
    if kind == "no delta":
        return manifest, 2, b"no delta"
    if kind == "truncated":
        return manifest, 2, good[:-1]
    if kind == "lost block":
        writer = deltas.DeltaWriter(*chain.states[2:4], tensors=chain.manifests[2].tensors)
        pieces = list(writer.pieces())
        return manifest, 2, b"".join([*pieces[:2], *pieces[3:]])
    if kind == "flipped":
        last_step = len(good) - TRAILER.size - 1
        return manifest, 2, good[:last_step] + bytes([good[last_step] ^ 1]) + good[last_step + 1 :]
    if kind == "wrong sha256":
        return manifest.model_copy(update={"sha256": chain.manifests[2].sha256}), 2, good
    if kind == "contradiction":
        return manifest.model_copy(update={"tensors": chain.manifests[4].tensors}), 2, good
    return manifest, 9, good


@pytest.mark.parametrize(("kind", "error"), BAD_DELTAS)
@pytest.mark.parametrize("keep_past", [True, False])
async def test_a_bad_delta_is_refused_and_everything_is_as_before(
    kind: str, error: type[WeightsError], keep_past: bool
) -> None:
    chain = Chain(5, has_sha256=True)
    history = await chain.history(3, keep_past=keep_past)
    manifest, base, data = _bad_delta(chain, kind)
    versions, held = history.versions, history.bytes_held
    live = bits_of(history._replica.state)
    with pytest.raises(error):
        await history.apply_delta(manifest, base, chain.spool(data))
    assert bits_of(history._replica.state) == live
    assert (history.versions, history.bytes_held, history.faults) == (versions, held, 0)
    assert chain.open_spools == len(versions) - 1
    await chain.must_hold(history, *versions)
    await chain.apply(history, 3)
    await chain.must_hold(history, *(versions if keep_past else ()), 3)


async def test_a_refusal_names_both_sides() -> None:
    chain = Chain(5)
    history = await chain.history(3)
    with pytest.raises(WrongBase) as caught:
        await history.apply_delta(chain.manifests[4], 2, chain.spool(4))
    assert chain.manifests[3].digest in str(caught.value)
    assert chain.manifests[2].digest in str(caught.value)
    other = Chain(2, shapes=SHAPES | {"a": ("F32", (8, 20))})
    with pytest.raises(WrongBase, match=r"'a'.*F32\[8, 20\].*F32\[20, 8\]"):
        await history.load_keyframe(
            other.manifests[1].model_copy(update={"version": 9}), other.keyframe(1)
        )
    await chain.must_hold(history, 0, 1, 2)


async def test_a_refused_delta_does_not_move_the_copy() -> None:
    chain = Chain(4)
    history = await chain.history(3)
    with pytest.raises(WrongBase):
        await history.apply_delta(chain.manifests[3], 0, chain.spool(3))
    assert history.position == 2


# --- what is held turns out to be wrong


async def test_a_flipped_bit_at_a_changed_element_gives_up_everything_at_the_next_step() -> None:
    chain = Chain(4)
    history = await chain.history(3)
    index, _ = changed_and_unchanged(chain.states[2], chain.states[3])
    flip(history, "a", index)
    with pytest.raises(Corrupt, match="copy of tensor 'a'"):
        await chain.apply(history, 3)
    assert (history.versions, history.position, history.bytes_held) == ((), -1, 0)
    assert (history.faults, chain.open_spools) == (1, 0)
    await history.load_keyframe(chain.manifests[2], chain.keyframe(2))
    await chain.apply(history, 3)
    await chain.must_hold(history, 2, 3)


@pytest.mark.parametrize("has_sha256", [False, True])
async def test_a_flipped_bit_is_noticed_on_the_way_to_another_version(has_sha256: bool) -> None:
    """At a changed element by the digests, at any element by the full hash of a small model."""
    chain = Chain(3, has_sha256=has_sha256)
    history = await chain.history(3)
    changed, unchanged = changed_and_unchanged(chain.states[1], chain.states[2])
    flip(history, "a", unchanged if has_sha256 else changed)
    with pytest.raises(MissingVersion, match="none"):
        async with history.at(1):
            pytest.fail("lent a wrong version")
    assert (history.versions, history.faults) == ((), 1)


async def test_a_flipped_bit_at_an_unchanged_element_is_noticed_by_verify() -> None:
    chain = Chain(4)
    history = await chain.history(4)
    assert await history.verify(2, sha256_of(chain.states[2]))
    assert history.position == 2
    await chain.must_hold(history, 0, 1, 2, 3)
    _, index = changed_and_unchanged(chain.states[3], chain.states[2])
    flip(history, "a", index)
    async with history.at(2) as state:
        assert bits_of(state) != chain.bits[2]  # digests cannot know
    assert not await history.verify(3, sha256_of(chain.states[3]))
    assert (history.versions, history.bytes_held, history.faults) == ((), 0, 1)
    assert chain.open_spools == 0
    with pytest.raises(MissingVersion):
        await history.verify(3, sha256_of(chain.states[3]))


class TamperedSpool(Spool):
    """Its memory goes bad once `is_bad` is set."""

    is_bad = False

    def read(self, offset: int, num_bytes: int) -> memoryview:
        data = bytearray(super().read(offset, num_bytes))
        if self.is_bad:
            data[-1] ^= 1
        return memoryview(bytes(data))


class UnreadableSpool(TamperedSpool):
    def read(self, offset: int, num_bytes: int) -> memoryview:
        if self.is_bad:
            raise OSError("Input/output error")
        return super().read(offset, num_bytes)


@pytest.mark.parametrize("kind", [TamperedSpool, UnreadableSpool])
@pytest.mark.parametrize("goal", [0, 4])
async def test_a_held_delta_that_went_bad_takes_along_what_it_led_to(goal: int, kind) -> None:
    chain = Chain(5)
    history = await chain.history(2)
    bad = kind()
    await chain.apply(history, 2, chain.spool(2, bad))
    await chain.apply(history, 3)
    await chain.apply(history, 4)
    async with history.at(1 if goal == 4 else 3):
        bad.is_bad = True
    with pytest.raises(MissingVersion) as caught:
        async with history.at(goal):
            pytest.fail("there is no way there")
    assert isinstance(caught.value.__cause__, (Corrupt, OSError))
    left = (0, 1) if goal == 4 else (2, 3, 4)
    assert caught.value.held == left
    assert history.faults == 1
    await chain.must_hold(history, *left)
    assert chain.open_spools == len(left) - 1
    if goal == 4:
        await chain.apply(history, 2)
        await chain.must_hold(history, 0, 1, 2)


async def test_memory_that_runs_out_is_no_fault_of_what_is_held() -> None:
    chain = Chain(3)
    history = await chain.history(3)
    read, link = Spool.read, chain.spools[1]

    def fail(spool: Spool, offset: int, num_bytes: int) -> memoryview:
        if spool is link:
            raise MemoryError
        return read(spool, offset, num_bytes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Spool, "read", fail)
        with pytest.raises(MemoryError):
            async with history.at(1):
                pytest.fail("not moved")
    await chain.must_hold(history, 0, 1, 2)
    assert history.faults == 0
