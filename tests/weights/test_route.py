from __future__ import annotations

import random

import pytest

from shared.weights.quarantine import MAX_PAUSE_S, Quarantine
from shared.weights.route import reachable, route
from shared.wire.weights import Artefact, Keyframe


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
    """Versions 0..9, deltas of 10 bytes, manifests with keyframes of 35 bytes at 0, 4, 8."""
    return {
        v: make_manifest(
            v,
            {},
            delta=_artefact("delta", v, 10) if v else None,
            keyframe=_artefact("keyframe", v, 35) if v % 4 == 0 else None,
        )
        for v in range(10)
    }


def _record(manifest, **changes: object) -> Keyframe:
    fields: dict[str, object] = {
        "version": manifest.version,
        "artefact": _artefact("keyframe", manifest.version, 35),
        "digest": manifest.digest,
        "sha256": "f" * 64,
        "published_at": 0.0,
        "producer": "test",
    }
    return Keyframe(**(fields | changes))  # type: ignore[arg-type]


def _names(steps) -> list[str] | None:
    if steps is None:
        return None
    return [f"{'-' if s.reverse else ''}{s.artefact.upload_id}" for s in steps]


def test_the_cheapest_way_wins(manifests) -> None:
    assert _names(route(manifests, {2}, 3)) == ["d3"]
    assert _names(route(manifests, {2}, 5)) == ["d3", "d4", "d5"]
    assert _names(route(manifests, {2}, 9)) == ["k8", "d9"]
    assert _names(route(manifests, set(), 6)) == ["k4", "d5", "d6"]
    assert _names(route(manifests, {7}, 7)) == []


def test_a_delta_is_taken_back_where_that_is_cheaper_or_the_only_way(manifests) -> None:
    assert _names(route(manifests, {5}, 3)) == ["-d5", "-d4"]
    assert _names(route(manifests, set(), 7)) == ["k8", "-d8"]
    assert _names(route(manifests, {9}, 1)) == ["k0", "d1"]
    del manifests[0]
    assert _names(route(manifests, {2}, 1)) == ["-d2"]
    # Version 3's own delta is lost: its successor leads back to it.
    assert _names(route(manifests, {2, 5}, 3, {"d3", "k4"})) == ["-d5", "-d4"]


def test_every_step_starts_where_the_one_before_ended(manifests) -> None:
    steps = route(manifests, {9}, 5)
    assert steps is not None
    assert [(s.base, s.manifest.version) for s in steps] == [(9, 8), (8, 7), (7, 6), (6, 5)]


def test_a_broken_artefact_is_avoided(manifests) -> None:
    assert _names(route(manifests, {2}, 5, {"d3"})) == ["k4", "d5"]
    assert _names(route(manifests, set(), 5, {"k4", "k8"})) == ["k0", "d1", "d2", "d3", "d4", "d5"]
    assert route(manifests, set(), 5, {"k4", "d3", "d6"}) is None
    assert route(manifests, {4}, 5, {"d5", "k4", "d7", "k8"}) is None


def test_a_gap_in_the_log_is_crossed_by_a_keyframe_or_not_at_all(manifests) -> None:
    del manifests[6]
    assert _names(route(manifests, {5}, 7)) == ["k8", "-d8"]
    assert route(manifests, {5}, 7, {"d8"}) is None
    assert _names(route(manifests, {5}, 9)) == ["k8", "d9"]
    assert route(manifests, {5}, 42) is None
    assert route(manifests, {5}, 6) is None


def test_a_keyframe_record_is_a_way_and_brings_its_hash(manifests) -> None:
    records = {5: [_record(manifests[5])]}
    steps = route(manifests, set(), 6, {"k4"}, records)
    assert _names(steps) == ["k5", "d6"]
    assert steps is not None
    assert steps[0].manifest.sha256 == "f" * 64
    assert manifests[5].sha256 is None


def test_of_several_keyframes_of_a_version_any_intact_one_will_do(manifests) -> None:
    older = _record(manifests[5], artefact=_artefact("keyframe", 50, 35))
    records = {5: [older, _record(manifests[5])]}
    assert _names(route(manifests, set(), 5, (), records)) == ["k5"]
    assert _names(route(manifests, set(), 5, {"k5"}, records)) == ["k50"]


def test_a_keyframe_record_of_other_bytes_or_of_a_purged_version_is_ignored(manifests) -> None:
    records = {5: [_record(manifests[5], digest="0" * 32)]}
    assert _names(route(manifests, set(), 5, (), records)) == ["k4", "d5"]
    del manifests[5]
    assert route(manifests, set(), 5, (), {5: [_record(manifests[4], version=5)]}) is None


def test_a_manifest_that_names_itself_as_parent_does_not_loop(manifests) -> None:
    manifests = {5: manifests[5].model_copy(update={"parent": 5})}
    assert route(manifests, set(), 5) is None


@pytest.mark.parametrize("seed", range(100))
def test_no_way_is_cheaper_than_the_one_returned(manifests, seed: int) -> None:
    rng = random.Random(seed)
    known = {
        v: m.model_copy(
            update={
                "delta": _artefact("delta", v, rng.randint(1, 50)) if v else None,
                "keyframe": _artefact("keyframe", v, rng.randint(1, 99)) if v % 3 == 0 else None,
            }
        )
        for v, m in manifests.items()
        if rng.random() > 0.1
    }
    held = {v for v in range(10) if rng.random() < 0.2}
    broken = {name for v in range(10) for name in (f"d{v}", f"k{v}") if rng.random() < 0.2}
    # Bellman-Ford: relax every edge until nothing improves.
    cost = dict.fromkeys(held, 0)
    for _ in range(10):
        for v, m in known.items():
            if m.keyframe is not None and m.keyframe.upload_id not in broken:
                cost[v] = min(cost.get(v, 10**9), m.keyframe.num_bytes)
            if m.delta is not None and m.delta.upload_id not in broken:
                if v - 1 in cost:
                    cost[v] = min(cost.get(v, 10**9), cost[v - 1] + m.delta.num_bytes)
                if v in cost and v - 1 in known:
                    cost[v - 1] = min(cost.get(v - 1, 10**9), cost[v] + m.delta.num_bytes)
    assert reachable(known, held, broken) == cost.keys() & known.keys()
    for target in range(10):
        steps = route(known, held, target, broken)
        if steps is None:
            assert target not in cost
            continue
        assert sum(s.artefact.num_bytes for s in steps) == cost[target]
        assert all(s.artefact.upload_id not in broken for s in steps)
        position = None
        for step in steps:
            assert step.base is None or step.base == position or position is None
            position = step.manifest.version
        assert position in (target, None)


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
