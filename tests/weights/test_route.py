from __future__ import annotations

import pytest

from shared.weights.quarantine import MAX_PAUSE_S, Quarantine
from shared.weights.route import route
from shared.wire.weights import Artefact


def _artefact(kind: str, version: int, num_bytes: int) -> Artefact:
    return Artefact(
        kind=kind,  # type: ignore[arg-type]
        upload_id=f"{kind[0]}{version}",
        num_chunks=1,
        num_bytes=num_bytes,
        digest="",
    )


@pytest.fixture
def manifests(make_manifest):
    """Versions 0..9, deltas of 10 bytes, keyframes of 35 bytes at 0, 4, 8; version 6 lacks a delta
    only in its own tests."""
    return {
        v: make_manifest(
            v,
            {},
            delta=_artefact("delta", v, 10) if v else None,
            keyframe=_artefact("keyframe", v, 35) if v % 4 == 0 else None,
        )
        for v in range(10)
    }


def _names(steps) -> list[str] | None:
    return None if steps is None else [s.artefact.upload_id for s in steps]


def test_the_cheapest_way_wins(manifests) -> None:
    assert _names(route(manifests, {2}, 3)) == ["d3"]
    assert _names(route(manifests, {2}, 5)) == ["d3", "d4", "d5"]
    assert _names(route(manifests, {2}, 9)) == ["k8", "d9"]
    assert _names(route(manifests, set(), 7)) == ["k4", "d5", "d6", "d7"]
    assert _names(route(manifests, {7}, 7)) == []


def test_a_broken_artefact_is_avoided(manifests) -> None:
    assert _names(route(manifests, {2}, 5, {"d3"})) == ["k4", "d5"]
    assert _names(route(manifests, set(), 5, {"k4"})) == ["k0", "d1", "d2", "d3", "d4", "d5"]
    assert route(manifests, set(), 5, {"k4", "d3"}) is None
    assert route(manifests, {4}, 5, {"d5"}) is None


def test_a_gap_in_the_log_is_crossed_by_a_keyframe_or_not_at_all(manifests) -> None:
    del manifests[6]
    assert route(manifests, {5}, 7) is None
    assert _names(route(manifests, {5}, 9)) == ["k8", "d9"]
    assert route(manifests, {5}, 42) is None


def test_a_manifest_that_names_itself_as_parent_does_not_loop(manifests) -> None:
    manifests[5] = manifests[5].model_copy(update={"parent": 5})
    assert route(manifests, set(), 5) is None


def test_a_failed_artefact_is_closed_twice_as_long_each_time() -> None:
    quarantine = Quarantine(2.0)
    quarantine.add("a", now=0.0)
    assert quarantine.closed(1.9) == {"a"}
    assert quarantine.closed(2.0) == frozenset()
    quarantine.add("a", now=2.0)
    assert quarantine.closed(5.9) == {"a"}
    assert quarantine.closed(6.0) == frozenset()
    for _ in range(10):
        quarantine.add("a", now=10.0)
    assert quarantine.closed(10.0 + MAX_PAUSE_S) == frozenset()
