from __future__ import annotations

import pytest
import torch

from shared.weights import stored_version
from shared.weights.digests import sha256_of, specs, verify_same, version_digest
from shared.weights.errors import WrongBase
from shared.weights.manifest_log import read_log


async def test_versions_count_from_zero_and_keyframes_are_announced_after_them(
    run_of, new_bus
) -> None:
    p = await run_of(0)
    assert p.head is None
    await p.more(6)
    manifests = p.manifests
    assert [m.version for m in manifests] == list(range(6))
    assert [m.parent for m in manifests] == [None, 0, 1, 2, 3, 4]
    assert [m.keyframe is not None for m in manifests] == [True] + 5 * [False]
    assert [m.delta is not None for m in manifests] == [False] + 5 * [True]
    assert len({m.upload_id for m in manifests}) == 6
    for manifest, state in zip(manifests, p.states, strict=False):
        assert manifest.tensors == specs(state)
        assert manifest.digest == version_digest(specs(state))
        assert manifest.sha256 == sha256_of(state)
    (record,) = (await read_log(new_bus())).keyframes
    assert (record.version, record.digest) == (4, manifests[4].digest)
    assert record.sha256 == manifests[4].sha256
    assert p.publisher.head == manifests[5]


async def test_the_live_weights_may_train_on_once_publish_has_returned(
    new_publisher, make_state, mutate, following
) -> None:
    p = await new_publisher()
    live = make_state(0)
    async with following("oldest_needed") as f:
        for seed in range(4):
            manifest = await p.put(live)
            published = {name: t.clone() for name, t in live.items()}
            for name, tensor in mutate(live, seed).items():
                live[name].copy_(tensor)  # in place, as an optimizer does
            await f.until_head(seed)
            assert manifest.sha256 == sha256_of(published) == await f.sha256(seed)


async def test_weights_that_are_not_contiguous_or_tied_are_published_as_what_they_hold(
    new_publisher, following
) -> None:
    p = await new_publisher()
    wide = torch.arange(12.0).reshape(3, 4)
    live = {"a": wide.t(), "b": wide, "c": wide[:, ::2]}
    first = await p.put(live)
    assert first.tensors == specs({n: t.contiguous() for n, t in live.items()})
    wide[1, 2] = -5.0
    second = await p.put(live)
    assert second.delta is not None
    assert second.tensors == specs({n: t.contiguous() for n, t in live.items()})
    async with following() as f:
        await f.until_head(1)
        assert await f.sha256(1) == sha256_of(live)


async def test_another_model_cannot_follow_in_the_same_run(new_publisher, make_state) -> None:
    p = await new_publisher()
    await p.put(make_state(0))
    with pytest.raises(WrongBase, match="wide"):
        await p.put(make_state(0) | {"wide": torch.zeros(9)})
    assert (await p.put(make_state(1))).version == 1


async def test_a_large_model_is_hashed_in_full_at_keyframes_only(
    run_of, new_bus, monkeypatch
) -> None:
    monkeypatch.setattr(stored_version, "SHA256_BYTES", 100)
    p = await run_of(5)
    assert [m.sha256 is not None for m in p.manifests] == [True] + 4 * [False]
    (record,) = (await read_log(new_bus())).keyframes
    assert record.sha256 == sha256_of(p.states[4])


def test_verify_same_accepts_only_the_very_bytes(make_state, make_manifest) -> None:
    state = make_state(0)
    manifest = make_manifest(5, state)
    assert verify_same(manifest, make_state(0))
    state["scalar"] = -state["scalar"]
    assert not verify_same(manifest, state)
