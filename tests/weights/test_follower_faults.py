from __future__ import annotations

from dataclasses import replace

import pytest

from shared.runtime import memory_bus
from shared.weights.keyframe_store import KeyframeStore
from shared.weights.manifest_log import read_log
from shared.wire.codec import encode
from shared.wire.subjects import Subjects
from shared.wire.weights import Manifest


@pytest.mark.parametrize("how", ["missing", "truncated", "flipped", "swapped"])
@pytest.mark.parametrize("start", ["newest", "oldest_needed"])
async def test_a_damaged_delta_leaves_the_held_weights_and_heals_at_the_keyframe(
    run_of, following, faults, how: str, start: str
) -> None:
    p = await run_of(2)
    async with following(start) as f:
        await f.until_head(1)

        def damage(manifest: Manifest) -> Manifest:
            faults.damage(manifest.delta, how)
            return manifest

        with faults.tamper(damage):
            await p.more(1)
        await f.until(lambda: f.follower.resyncs > 0)
        assert f.heads[-1] == 1
        assert f.history.newest == 1
        assert await f.sha256(1) == p.manifests[1].sha256
        await p.more(1)
        await f.until(lambda: f.follower.newest_known == 3)
        assert f.follower.keyframe_wanted
        await p.more(1)
        await f.until_head(4)
        assert await f.sha256(4) == p.manifests[4].sha256
        await f.until(lambda: not f.follower.keyframe_wanted)


async def test_versions_behind_a_lost_delta_are_reached_backwards_from_a_keyframe(
    run_of, following, faults
) -> None:
    p = await run_of(2)
    async with following("oldest_needed") as f:
        await f.until_head(1)

        def damage(manifest: Manifest) -> Manifest:
            faults.damage(manifest.delta, "missing")
            return manifest

        with faults.tamper(damage):
            await p.more(1)
        await p.more(1)
        await f.until(lambda: f.follower.keyframe_wanted)
        assert f.versions == [0, 1]
        assert await p.publisher.publish_keyframe(reason="wanted") is not None
        await f.until_head(3)
        await f.until(lambda: len(f.versions) == 4)
        assert not f.follower.keyframe_wanted
        for version in range(4):
            assert await f.sha256(version) == p.manifests[version].sha256


@pytest.mark.parametrize("start", ["newest", "oldest_needed"])
async def test_a_follower_without_a_way_asks_for_a_keyframe_and_heals_with_it(
    run_of, following, faults, start: str
) -> None:
    p = await run_of(3, keyframe_every=100)
    for seq in faults.chunks(p.manifests[0].keyframe):
        faults.remove(seq)
    async with following(start) as f:
        await f.until(lambda: f.follower.keyframe_wanted)
        assert f.heads == []
        assert f.follower.resyncs > 0
        assert await p.publisher.publish_keyframe(reason="wanted") is not None
        await f.until_head(2)
        await f.until(lambda: not f.follower.keyframe_wanted)
        assert await f.sha256(2) == p.manifests[2].sha256


async def test_no_keyframe_is_asked_for_that_would_not_help(run_of, following, faults) -> None:
    p = await run_of(5)
    for version in (2, 3):  # both ways to version 2
        faults.damage(p.manifests[version].delta, "flipped")
    async with following("oldest_needed") as f:
        await f.until_head(4)
        assert f.follower.resyncs >= 1
        assert 2 not in f.versions
        assert not f.follower.keyframe_wanted


async def test_a_chunk_that_appears_late_is_waited_for(run_of, following, faults, server) -> None:
    p = await run_of(2)
    stream = server.streams[Subjects("t").stream("chunks")]
    seq = faults.chunks(p.manifests[1].delta)[0]
    late = stream.records[seq]
    faults.remove(seq)
    async with following("oldest_needed") as f:
        await f.until(lambda: f.follower.resyncs > 0)
        assert f.versions == [0]
        stream.records[seq] = late
        stream.by_subject[late.subject] = seq
        await f.until_head(1)
        assert f.versions == [0, 1]


async def test_a_chunk_that_is_stored_twice_is_read_once(run_of, following, faults, server) -> None:
    p = await run_of(2)
    stream = server.streams[Subjects("t").stream("chunks")]
    for artefact in (p.manifests[0].keyframe, p.manifests[1].delta):
        for seq in faults.chunks(artefact):
            record = stream.records[seq]
            server.append(Subjects("t").stream("chunks"), record.subject, record.payload, None, "")
    async with following() as f:
        await f.until_head(1)
        assert f.follower.resyncs == 0


async def test_manifests_in_another_order_are_applied_in_theirs(
    run_of, following, faults, server, monkeypatch
) -> None:
    monkeypatch.setattr(memory_bus, "MAX_BATCH", 1)
    p = await run_of(4)
    records = server.streams[Subjects("t").stream("manifests")].records
    records[2], records[3] = (
        replace(records[3], seq=2),
        replace(records[2], seq=3),
    )
    async with following("oldest_needed", faults.trickling()) as f:
        await f.until_head(3)
        assert f.versions == [0, 1, 2, 3]
        assert f.follower.resyncs == 0
        assert await f.sha256(3) == p.manifests[3].sha256


async def test_a_manifest_that_comes_twice_changes_nothing(run_of, following, server) -> None:
    p = await run_of(2)
    name = Subjects("t").stream("manifests")
    other = p.manifests[1].model_copy(update={"upload_id": "f" * 32, "delta": p.manifests[1].delta})
    for again in (p.manifests[1], other):
        server.append(name, Subjects("t").manifest, encode(again), None, "")
    async with following("oldest_needed") as f:
        await f.until_head(1)
        assert f.versions == [0, 1]
        assert f.history.manifest(1).upload_id == p.manifests[1].upload_id


@pytest.mark.parametrize("start", ["newest", "oldest_needed"])
async def test_a_gap_in_the_log_is_crossed_at_the_next_keyframe(
    run_of, following, faults, start: str
) -> None:
    p = await run_of(2)
    async with following(start) as f:
        await f.until_head(1)
        await p.more(0)
        with faults.tamper(lose=True):
            await p.more(1)
        await p.more(1)
        await f.until(lambda: f.follower.newest_known == 3)
        await f.until(lambda: f.follower.keyframe_wanted)
        assert f.heads[-1] == 1
        await p.publisher.publish_keyframe(reason="wanted")
        await f.until_head(3)
        assert await f.sha256(3) == p.manifests[3].sha256


async def test_a_vanished_keyframe_is_replaced_by_the_one_before_it(
    run_of, following, faults, new_bus
) -> None:
    p = await run_of(7)
    (record,) = (await read_log(new_bus())).keyframes
    for seq in faults.chunks(record.artefact):
        faults.remove(seq)
    async with following() as f:
        await f.until_head(6)
        assert f.follower.resyncs == 1
        assert await f.sha256(6) == p.manifests[6].sha256


async def test_a_keyframe_file_that_vanished_or_was_damaged_is_replaced_by_another(
    run_of, following, new_bus, tmp_path
) -> None:
    store = KeyframeStore(str(tmp_path))
    p = await run_of(7, store=store)
    (record,) = (await read_log(new_bus())).keyframes
    file = tmp_path / record.artefact.location
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    async with following(store=store) as f:
        await f.until_head(6)
        assert f.follower.resyncs == 1
        assert await f.sha256(6) == p.manifests[6].sha256
    store.delete(record.artefact.upload_id)
    async with following(store=store) as f:
        await f.until_head(6)
        assert f.follower.resyncs == 1


async def test_a_follower_without_the_store_says_what_to_configure(
    run_of, following, tmp_path, caplog
) -> None:
    await run_of(2, store=KeyframeStore(str(tmp_path)))
    async with following() as f:
        await f.until(lambda: f.follower.keyframe_wanted)
        assert f.heads == []
    assert any("keyframe_store" in str(r.__dict__) for r in caplog.records)
