from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shared.weights.bits import same_bits
from shared.weights.digests import specs, version_digest
from shared.weights.errors import MissingVersion
from shared.weights.history import WeightHistory
from shared.weights.publisher import verify_same
from shared.weights.retention import KeyframePlace, oldest_kept, oldest_needed
from shared.wire.base import Array
from shared.wire.weights import Canary, Manifest


def _manifest(state) -> Manifest:
    canary = Canary(
        token_ids=Array.of([[0, 0]], "i4"), logprobs=Array.of([[0]], "f4"), tolerance=0.0
    )
    return Manifest(
        version=0,
        parent=None,
        upload_id="u",
        delta=None,
        keyframe=None,
        tensors=specs(state),
        digest="d",
        sha256=None,
        canary=canary,
        published_at=0.0,
        producer="t",
    )


def test_a_snapshot_does_not_follow_in_place_training(make_state, make_manifest) -> None:
    live = make_state(0)
    history = WeightHistory()
    manifest = make_manifest(0, live)
    history.append(manifest, live)
    for tensor in live.values():
        tensor.add_(1)
    held = history.materialise(0)
    assert version_digest(specs(held)) == manifest.digest
    assert version_digest(specs(live)) != manifest.digest


def test_unchanged_tensors_are_held_once(make_state, mutate, make_manifest) -> None:
    old = make_state(0)
    new = mutate(old, 1)
    history = WeightHistory()
    history.append(make_manifest(0, old), old)
    one = history.bytes_held
    history.append(make_manifest(1, new), new)
    assert history.materialise(1)["steps"] is history.materialise(0)["steps"]
    assert history.materialise(1)["wte.weight"] is not history.materialise(0)["wte.weight"]
    assert one < history.bytes_held < 2 * one
    assert version_digest(specs(history.materialise(0))) == history.manifest(0).digest
    assert version_digest(specs(history.materialise(1))) == history.manifest(1).digest


def test_a_miss_raises_and_names_what_is_held(make_state, make_manifest) -> None:
    history = WeightHistory()
    with pytest.raises(MissingVersion, match="none"):
        history.materialise(0)
    state = make_state(0)
    for version in (3, 4):
        history.append(make_manifest(version, state), state)
    with pytest.raises(MissingVersion, match=r"version 2 .*3\.\.4") as caught:
        history.materialise(2)
    assert (caught.value.version, caught.value.held) == (2, (3, 4))
    with pytest.raises(MissingVersion):
        history.manifest(5)


def test_a_number_cannot_be_held_with_other_bytes(make_state, make_manifest) -> None:
    history = WeightHistory()
    history.append(make_manifest(1, make_state(0)), make_state(0))
    history.append(make_manifest(1, make_state(0)), make_state(0))
    with pytest.raises(ValueError, match="version 1"):
        history.append(make_manifest(1, make_state(1)), make_state(1))
    assert history.versions == (1,)


def test_a_state_that_is_not_the_manifests_is_refused(make_state, make_manifest) -> None:
    state = make_state(0)
    manifest = make_manifest(0, state)
    del state["scalar"]
    with pytest.raises(ValueError, match="scalar"):
        WeightHistory().append(manifest, state)


def test_older_versions_can_join_later(make_state, mutate, make_manifest) -> None:
    states = [make_state(0)]
    for i in range(4):
        states.append(mutate(states[-1], i))
    history = WeightHistory()
    for version in (3, 4, 1, 0, 2):
        history.append(make_manifest(version, states[version]), states[version])
    assert history.versions == (0, 1, 2, 3, 4)
    assert history.newest == 4
    for version, state in enumerate(states):
        held = history.materialise(version)
        assert all(same_bits(held[n], state[n]) for n in state)


@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 12)), max_size=30),
)
def test_eviction_never_drops_a_version_at_or_above_the_mark_nor_the_newest(events) -> None:
    history = WeightHistory()
    held: set[int] = set()
    state = {"w": torch.zeros(1)}
    base = _manifest(state)
    for is_append, version in events:
        if is_append:
            history.append(base.model_copy(update={"version": version}), state)
            held.add(version)
        else:
            dropped = history.evict_below(version)
            assert all(v < version for v in dropped)
            held = {v for v in held if v >= version or v == max(held)}
        assert set(history.versions) == held
        for version in held:
            assert history.materialise(version)["w"].item() == 0.0


def test_a_materialised_version_survives_its_eviction(make_state, mutate, make_manifest) -> None:
    history = WeightHistory()
    state = make_state(0)
    history.append(make_manifest(0, state), state)
    using = history.materialise(0)
    newer = mutate(state, 1)
    history.append(make_manifest(1, newer), newer)
    assert history.evict_below(1) == (0,)
    assert version_digest(specs(using)) == make_manifest(0, state).digest


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, 9),
        ({"token_versions": [7, 8]}, 7),
        ({"token_versions": [7], "issue_versions": [5, 9]}, 5),
        ({"token_versions": [7], "issue_versions": [8], "checkpoint_versions": [3, 6]}, 3),
        ({"issue_versions": [12]}, 9),
    ],
)
def test_the_low_water_mark_is_the_oldest_reference(arguments, expected: int) -> None:
    assert oldest_needed(9, **arguments) == expected


def test_retention_keeps_the_newest_keyframe_at_or_below_the_mark() -> None:
    places = [KeyframePlace(v, v + 1, f"u{v}") for v in (0, 4, 8)]
    assert [oldest_kept(places, n) for n in (0, 3, 4, 7, 8, 99)] == [
        places[0],
        places[0],
        places[1],
        places[1],
        places[2],
        places[2],
    ]
    assert oldest_kept(places[1:], 3) is None


def test_verify_same_accepts_only_the_very_bytes(make_state, make_manifest) -> None:
    state = make_state(0)
    manifest = make_manifest(5, state)
    assert verify_same(manifest, make_state(0))
    state["scalar"] = -state["scalar"]
    assert not verify_same(manifest, state)
