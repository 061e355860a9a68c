from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import nullcontext

import pytest

from shared.weights import history as history_module
from shared.weights.errors import ChunkGone, Corrupt
from shared.weights.spool import Spool
from tests.weights.chains import (
    Chain,
    flip,
)

# --- keyframes over held versions


@pytest.mark.parametrize("at", [0, 1, 2])
async def test_a_keyframe_over_held_versions_becomes_a_link(at: int) -> None:
    chain = Chain(9)
    history = await chain.history(3)
    async with history.at(at):
        pass
    await history.load_keyframe(chain.manifests[6], chain.keyframe(6))
    assert history.position == 6
    await chain.apply(history, 7)
    await chain.must_hold(history, 0, 1, 2, 6, 7)
    await history.load_keyframe(chain.manifests[4], chain.keyframe(4))
    await chain.apply(history, 3)
    await chain.apply(history, 5)
    await chain.must_hold(history, 0, 1, 2, 3, 4, 5, 6, 7)
    history.evict_below(5)
    await chain.must_hold(history, 5, 6, 7)


@pytest.mark.parametrize("keep_past", [True, False])
async def test_a_keyframe_that_turns_out_corrupt_at_its_very_end(keep_past: bool) -> None:
    chain = Chain(9)
    history = await chain.history(4, keep_past=keep_past)
    versions, held = history.versions, history.bytes_held

    async def pieces() -> AsyncIterator[bytes]:
        async for piece in chain.keyframe(8):
            yield piece
        raise Corrupt("keyframe", "xxh3 of what was published", "another one")

    with pytest.raises(Corrupt, match="xxh3"):
        await history.load_keyframe(chain.manifests[8], pieces())
    if keep_past:
        assert (history.versions, history.bytes_held) == (versions, held)
        await chain.must_hold(history, *versions)
        await chain.apply(history, 4)
        await chain.must_hold(history, *versions, 4)
    else:
        assert (history.versions, history.bytes_held) == ((), 0)
        await history.load_keyframe(chain.manifests[8], chain.keyframe(8))
        await chain.must_hold(history, 8)
    assert history.faults == 0


async def test_a_keyframe_of_another_version_is_refused() -> None:
    chain = Chain(9)
    history = await chain.history(3)
    with pytest.raises(Corrupt):
        await history.load_keyframe(chain.manifests[8], chain.keyframe(7))
    lie = chain.manifests[8].model_copy(update={"tensors": chain.manifests[7].tensors})
    with pytest.raises(Corrupt, match="manifest 8"):
        await history.load_keyframe(lie, chain.keyframe(7))
    await chain.must_hold(history, 0, 1, 2)


@pytest.mark.parametrize("num_pieces", [0, 1, 3])
async def test_a_keyframe_whose_pieces_stop_is_taken_back(num_pieces: int) -> None:
    chain = Chain(9)
    history = await chain.history(3)
    is_closed = False

    async def pieces() -> AsyncIterator[bytes]:
        nonlocal is_closed
        count = 0
        try:
            async for piece in chain.keyframe(8, piece_bytes=300):
                if count == num_pieces:
                    raise ChunkGone("chunks.x.3")
                count += 1
                yield piece
        finally:
            is_closed = True

    with pytest.raises(ChunkGone):
        await history.load_keyframe(chain.manifests[8], pieces())
    assert is_closed
    await chain.must_hold(history, 0, 1, 2)


async def test_a_keyframe_over_a_wrong_copy_heals_it_and_gives_up_the_past() -> None:
    chain = Chain(9)
    history = await chain.history(3)
    flip(history, "a", 3)
    await history.load_keyframe(chain.manifests[6], chain.keyframe(6))
    await chain.must_hold(history, 6)
    assert (history.faults, chain.open_spools) == (1, 0)
    await chain.apply(history, 7)
    await chain.must_hold(history, 6, 7)


async def test_pieces_are_closed_even_when_they_are_not_needed() -> None:
    chain = Chain(2)
    history = await chain.history(2)
    pieces = chain.keyframe(1)
    await history.load_keyframe(chain.manifests[1], pieces)
    assert [piece async for piece in pieces] == []


@pytest.mark.parametrize("good", [True, False])
async def test_the_capture_is_kept_as_a_link_or_closed(
    good: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = Chain(9)
    captures: list[Spool] = []

    def new_spool(memory_bytes: int) -> Spool:
        captures.append(Spool(memory_bytes))
        return captures[-1]

    monkeypatch.setattr(history_module, "Spool", new_spool)
    history = await chain.history(3)
    assert not captures
    with nullcontext() if good else pytest.raises(Corrupt):
        await history.load_keyframe(chain.manifests[8], chain.keyframe(8 if good else 7))
    assert [spool.size > 0 for spool in captures] == [good]
    await chain.must_hold(history, 0, 1, 2, *([8] if good else []))


async def test_a_capture_takes_no_more_memory_than_the_other_deltas_leave_it() -> None:
    chain = Chain(9)
    limit = sum(map(len, chain.deltas[:3])) + 100
    history = await chain.history(3, spool_bytes=limit)
    assert history.bytes_spilled == 0
    await history.load_keyframe(chain.manifests[8], chain.keyframe(8))
    assert history.bytes_held == chain.size + limit
    assert history.bytes_spilled > 0
    assert chain.open_spools == 2  # those that were there stay where they are
    await chain.must_hold(history, 0, 1, 2, 8)
    history.clear()
