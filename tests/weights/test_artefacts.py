from __future__ import annotations

import asyncio

import pytest

from shared.weights import deltas, keyframes
from shared.weights.chunks import download, upload
from shared.weights.digests import specs, version_digest
from shared.weights.errors import ChunkGone, Corrupt
from shared.weights.fan_out import fan_out
from shared.weights.rebuild import changed_names, from_delta, from_keyframe
from shared.wire.weights import Artefact


def _artefact(kind: str, encoding: str) -> Artefact:
    return Artefact(
        kind=kind,  # type: ignore[arg-type]
        upload_id="u",
        num_chunks=1,
        num_bytes=1,
        digest="",
        encoding=encoding,
    )


@pytest.mark.parametrize("size", [0, 1, 99, 100, 101, 1050])
async def test_bytes_come_back_from_their_chunks(new_bus, size: int) -> None:
    data = bytes(i % 251 for i in range(size))
    artefact = await upload(new_bus(), "delta", data, upload_id="u", encoding="x", chunk_bytes=100)
    assert artefact.num_chunks == max(1, -(-size // 100))
    assert artefact.num_bytes == size
    assert await download(new_bus(), artefact, timeout_s=0.0) == data


async def test_chunks_stay_below_the_detour_of_blobs(new_bus) -> None:
    bus = new_bus()
    artefact = await upload(
        bus, "delta", b"x" * bus.max_payload, upload_id="u", encoding="x", chunk_bytes=1 << 30
    )
    assert artefact.num_chunks == 2
    assert (await bus.stream_state("blobs")).num_messages == 0


async def test_wrong_bytes_missing_chunks_and_absurd_counts_are_refused(new_bus) -> None:
    bus = new_bus()
    artefact = await upload(bus, "delta", b"a" * 250, upload_id="u", encoding="x", chunk_bytes=100)
    await bus.append(bus.subjects.chunk("u", 1), b"b" * 100)
    with pytest.raises(Corrupt, match="xxh3"):
        await download(bus, artefact, timeout_s=0.0)
    await bus.append(bus.subjects.chunk("u", 1), b"a" * 99)
    with pytest.raises(Corrupt, match="249 bytes"):
        await download(bus, artefact, timeout_s=0.0)
    with pytest.raises(ChunkGone, match=r"chunk\.u\.3"):
        await download(bus, artefact.model_copy(update={"num_chunks": 4}), timeout_s=0.0)
    with pytest.raises(Corrupt, match="chunks"):
        await download(bus, artefact.model_copy(update={"num_chunks": 10**9}), timeout_s=0.0)


async def test_fan_out_keeps_order_runs_a_window_at_once_and_raises_the_error_itself() -> None:
    running = peak = 0

    async def work(number: int) -> int:
        nonlocal running, peak
        running += 1
        peak = max(peak, running)
        await asyncio.sleep(0.002 * (number % 3))
        running -= 1
        if number == 99:
            raise LookupError(number)
        return number * 2

    assert await fan_out(work, range(10), window=3) == list(range(0, 20, 2))
    assert peak == 3
    assert await fan_out(work, range(0), window=3) == []
    with pytest.raises(LookupError):
        await fan_out(work, range(90, 120))


def test_a_keyframe_that_is_another_version_is_refused_by_digest_alone(
    make_state, make_manifest
) -> None:
    manifest = make_manifest(0, make_state(0))
    artefact = _artefact("keyframe", keyframes.ENCODING)
    assert set(from_keyframe(manifest, artefact, keyframes.encode(make_state(0)))) == set(
        make_state(0)
    )
    with pytest.raises(Corrupt, match="version 0"):
        from_keyframe(manifest, artefact, keyframes.encode(make_state(1)))


def test_a_delta_that_gives_another_version_is_refused_by_digest_alone(
    make_state, mutate, make_manifest
) -> None:
    old = make_state(0)
    new, other = mutate(old, 1), mutate(old, 2)
    before, after = make_manifest(0, old), make_manifest(1, new)
    artefact = _artefact("delta", deltas.CODEC)
    state = from_delta(after, artefact, deltas.encode(old, new), before, old)
    assert version_digest(specs(state)) == after.digest
    with pytest.raises(Corrupt, match="version 1"):
        from_delta(after, artefact, deltas.encode(old, other), before, old)


def test_a_manifest_whose_tensors_are_not_its_digests_is_refused(make_state, make_manifest) -> None:
    state = make_state(0)
    lying = make_manifest(0, state).model_copy(update={"tensors": specs(make_state(1))})
    artefact = _artefact("keyframe", keyframes.ENCODING)
    with pytest.raises(Corrupt):
        from_keyframe(lying, artefact, keyframes.encode(state))


def test_an_unknown_encoding_is_refused_by_name(make_state, make_manifest) -> None:
    manifest = make_manifest(0, make_state(0))
    with pytest.raises(Corrupt, match="gap8"):
        from_keyframe(manifest, _artefact("keyframe", "gap8"), b"")
    with pytest.raises(Corrupt, match="gap8"):
        from_delta(manifest, _artefact("delta", "gap8"), b"", manifest, make_state(0))


def test_changed_names_are_those_whose_specs_differ(make_state, mutate, make_manifest) -> None:
    old = make_state(0)
    new = mutate(old, 1)
    first = make_manifest(0, old)
    assert changed_names(None, first) is None
    assert changed_names(first, make_manifest(1, new)) == {
        "wte.weight",
        "half.weight",
        "wide",
        "scalar",
    }
    fewer = {k: v for k, v in old.items() if k != "wide"}
    assert changed_names(first, make_manifest(1, fewer)) is None
