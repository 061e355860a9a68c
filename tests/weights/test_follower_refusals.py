from __future__ import annotations

import asyncio

import pytest
import torch

from shared.runtime.memory_bus import MemoryBus
from shared.wire import codec, versioning
from shared.wire.subjects import Subjects
from shared.wire.versioning import WIRE_VERSION
from shared.wire.weights import Manifest


async def test_a_delta_for_another_base_is_refused_with_both_digests_named(
    run_of, following, faults, caplog
) -> None:
    p = await run_of(2)
    # Version 2 names the bytes of version 1's delta: intact, but for another base.
    stale = p.manifests[1].delta
    async with following() as f:
        await f.until_head(1)
        with faults.tamper(lambda m: m.model_copy(update={"delta": stale})):
            await p.more(1)
        await f.until(lambda: f.follower.resyncs > 0)
        (reason,) = {str(r.__dict__) for r in caplog.records if r.message == "weights_resync"}
        assert p.manifests[0].digest in reason  # the base that it was made for
        assert p.manifests[1].digest in reason  # what is held
        assert f.heads == [1]
        assert await f.sha256(1) == p.manifests[1].sha256
        await p.more(2)
        await f.until_head(4)


async def test_a_delta_of_another_model_is_refused_with_both_sides_named(
    run_of, following, faults, server, new_publisher, make_state, caplog
) -> None:
    p = await run_of(2)
    other = MemoryBus(Subjects("other"), server)
    await other.create_streams()
    q = await new_publisher(other)
    theirs = await q.put(make_state(0) | {"wide": torch.zeros(7)})
    foreign = await q.put(make_state(1) | {"wide": torch.ones(7)})
    chunks = Subjects("other").stream("chunks")
    for record in list(server.streams[chunks].records.values()):
        subject = record.subject.replace(".other.", ".t.")
        server.append(Subjects("t").stream("chunks"), subject, record.payload, None, "")
    async with following() as f:
        await f.until_head(1)
        with faults.tamper(lambda m: m.model_copy(update={"delta": foreign.delta})):
            await p.more(1)
        await f.until(lambda: f.follower.resyncs > 0)
        (reason,) = {str(r.__dict__) for r in caplog.records if r.message == "weights_resync"}
        assert p.manifests[1].digest in reason
        assert theirs.digest in reason
        assert f.heads == [1]
        assert await f.sha256(1) == p.manifests[1].sha256
        with faults.tamper(lambda m: foreign.model_copy(update={"version": 3, "parent": 2})):
            await p.more(1)
        await f.until(lambda: f.follower.newest_known == 3)
        await f.until(lambda: f.follower.keyframe_wanted)
        assert f.heads == [1]
        await p.more(1)
        await f.until_head(4)


async def test_bytes_that_rebuild_another_version_are_never_shown(
    run_of, following, faults
) -> None:
    p = await run_of(1)
    async with following() as f:
        await f.until_head(0)
        with faults.tamper(lambda m: m.model_copy(update={"sha256": "0" * 64})):
            await p.more(1)
        await f.until(lambda: f.follower.resyncs > 0)
        assert f.heads == [0]
        assert f.history.versions == (0,)
        assert await f.sha256(0) == p.manifests[0].sha256


@pytest.mark.parametrize("field", ["digest", "tensors", "encoding"])
async def test_a_manifest_that_contradicts_its_bytes_or_itself_is_not_believed(
    run_of, following, faults, field: str
) -> None:
    p = await run_of(1)

    def change(manifest: Manifest) -> Manifest:
        if field == "digest":
            return manifest.model_copy(update={"digest": "0" * 32})
        if field == "tensors":
            return manifest.model_copy(update={"tensors": manifest.tensors[1:]})
        delta = manifest.delta.model_copy(update={"encoding": "blocks-9"})
        return manifest.model_copy(update={"delta": delta})

    async with following() as f:
        await f.until_head(0)
        with faults.tamper(change):
            await p.more(1)
        await f.until(lambda: f.follower.resyncs > 0)
        assert f.heads == [0]
        assert await f.sha256(0) == p.manifests[0].sha256
        await p.more(1)
        if field == "encoding":  # the bytes are right: the next version is reached by a keyframe
            await p.publisher.publish_keyframe(reason="wanted")
            await f.until_head(2)


async def test_a_keyframe_record_that_cannot_be_read_harms_nobody(
    run_of, following, server
) -> None:
    p = await run_of(3)
    name = Subjects("t").stream("manifests")
    server.append(name, Subjects("t").keyframe, b"not msgpack", None, "")
    server.append(name, f"{Subjects('t').prefix}.manifest.later", b"of a later minor", None, "")
    async with following() as f:
        await f.until_head(2)
        assert f.follower.refused == {}
        await p.more(1)
        await f.until_head(3)


async def test_a_manifest_of_a_future_format_is_refused_until_it_can_be_read(
    run_of, following, server, monkeypatch
) -> None:
    p = await run_of(2)
    async with following() as f:
        await f.until_head(1)
        with monkeypatch.context() as future:
            future.setattr(codec, "WIRE_VERSION", (WIRE_VERSION[0] + 1, 0))
            await p.more(1)
        await f.until(lambda: bool(f.follower.refused))
        (reason,) = f.follower.refused.values()
        assert "upgrade" in reason
        assert f"wire {WIRE_VERSION[0] + 1}.0 cannot be read by {WIRE_VERSION[0]}." in reason
        assert f.heads == [1]
        assert await f.sha256(1) == p.manifests[1].sha256
        await asyncio.sleep(0.2)  # looked at again several times, counted once
        assert f.follower.resyncs == 1
        with pytest.raises(TimeoutError):
            await f.follower.ensure(2, 0.1)
        monkeypatch.setattr(versioning, "WIRE_VERSION", (WIRE_VERSION[0] + 1, 0))
        await f.until_head(2)
        assert f.follower.refused == {}


async def test_a_refused_manifest_is_skipped_at_the_next_keyframe(
    run_of, following, monkeypatch
) -> None:
    p = await run_of(2)
    async with following() as f:
        with monkeypatch.context() as future:
            future.setattr(codec, "WIRE_VERSION", (WIRE_VERSION[0] + 1, 0))
            await p.more(1)
        await p.more(2)
        await f.until_head(4)
        assert await f.sha256(4) == p.manifests[4].sha256
